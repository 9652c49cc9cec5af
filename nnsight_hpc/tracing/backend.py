"""Where a graph runs: here, or somewhere else. The remote backend is found by its entry point, so that it can be absent."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Protocol

from nnsight_hpc.execution import run_graph
from nnsight_hpc.wire.errors import NotFound

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from nnsight_hpc.graph import Graph
    from nnsight_hpc.tracing.models import NNsight

GROUP = "nnsight_hpc.backends"


class Submitted(Protocol):
    """A request that runs elsewhere, or waits there."""

    id: str

    def status(self) -> Any: ...
    def wait(self, timeout: float | None = None) -> Any: ...
    def result(self, timeout: float | None = None) -> dict[str, Any]: ...
    def cancel(self) -> Any: ...
    def logs(self, *, follow: bool = False) -> Any: ...


class Backend(Protocol):
    """Runs a graph somewhere. `remote` says that it is not this process."""

    remote: bool

    def run(self, graph: Graph, tensors: Mapping[str, torch.Tensor], model: NNsight, **local: Any) -> dict[str, Any]:
        """Run `graph` with its tensor constants and return what it saves, by name."""
        ...

    def submit(self, graph: Graph, tensors: Mapping[str, torch.Tensor], model: NNsight) -> Submitted:
        """Have `graph` run, and return at once."""
        ...


class LocalBackend:
    """Runs graphs in this process, on the model's own device."""

    remote = False

    def run(self, graph: Graph, tensors: Mapping[str, torch.Tensor], model: NNsight, **local: Any) -> dict[str, Any]:
        return run_graph(graph, tensors, model.module, **local)

    def submit(self, graph: Graph, tensors: Mapping[str, torch.Tensor], model: NNsight) -> Submitted:
        raise NotImplementedError("what runs in this process is run at once")


def backend(*, remote: bool, pool: str | None, cluster: str | None) -> Backend:
    """The local backend, or the remote one for that pool (None: the one with the same weights) of that cluster."""
    if not remote:
        return LocalBackend()
    for entry in entry_points(group=GROUP, name="remote"):
        made: Backend = entry.load()(pool=pool, cluster=cluster)
        return made
    raise NotFound(
        "there is no remote backend", next='install nnsight-hpc with its client: pip install "nnsight-hpc[client]"'
    )
