"""Where a graph runs: here, or somewhere else. What other parts do is found by entry points, so that they can be absent."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Protocol

from nnsight_hpc.execution import run_graph
from nnsight_hpc.models import Loaded
from nnsight_hpc.wire.errors import NotFound

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import torch

    from nnsight_hpc.graph import Graph
    from nnsight_hpc.storage import ActivationDataset
    from nnsight_hpc.tracing.models import NNsight
    from nnsight_hpc.wire.messages import DumpSpec

GROUP = "nnsight_hpc.backends"


class Submitted(Protocol):
    """A request that runs elsewhere, or waits there."""

    id: str

    def status(self) -> Any: ...
    def wait(self, timeout: float | None = None) -> Any: ...
    def result(self, timeout: float | None = None) -> dict[str, Any]: ...
    def cancel(self) -> Any: ...
    def logs(self, *, follow: bool = False) -> Any: ...


class Dumped(Submitted, Protocol):
    """A dump that runs elsewhere, or that has run here; `result` is its summary."""

    @property
    def path(self) -> Path: ...
    def dataset(self) -> ActivationDataset: ...


class NewDataset(Protocol):
    """A dataset that is to be written: its name, its corpus as it is sent, and a hash of that."""

    name: str
    lines: bytes
    fingerprint: str

    def check_capture(self, name: str) -> None:
        """Raise `InvalidInput` for what cannot be the name of a capture."""
        ...


class Backend(Protocol):
    """Runs a graph somewhere. `remote` says that it is not this process."""

    remote: bool

    def run(self, graph: Graph, tensors: Mapping[str, torch.Tensor], model: NNsight, **local: Any) -> dict[str, Any]:
        """Run `graph` with its tensor constants and return what it saves, by name."""
        ...

    def submit(self, graph: Graph, tensors: Mapping[str, torch.Tensor], model: NNsight) -> Submitted:
        """Have `graph` run, and return at once."""
        ...

    def dump(self, spec: DumpSpec, block: bytes, model: NNsight) -> Dumped:
        """Have a dataset written: `block` is what follows the spec."""
        ...


class LocalBackend:
    """Runs graphs in this process, on the model's own device."""

    remote = False

    def run(self, graph: Graph, tensors: Mapping[str, torch.Tensor], model: NNsight, **local: Any) -> dict[str, Any]:
        return run_graph(graph, tensors, model.module, **local)

    def submit(self, graph: Graph, tensors: Mapping[str, torch.Tensor], model: NNsight) -> Submitted:
        raise NotImplementedError("what runs in this process is run at once")

    def dump(self, spec: DumpSpec, block: bytes, model: NNsight) -> Dumped:
        loaded = Loaded(model.module, getattr(model, "tokenizer", None), model.identity(remote=True))
        dumped: Dumped = _found("dump")(spec, block, loaded)
        return dumped


def backend(*, remote: bool, pool: str | None = None, cluster: str | None = None, **sending: Any) -> Backend:
    """The local backend, or the remote one for that pool (None: the one with the same weights) of that cluster.

    `sending`: what else the sender of a request says of it; see `NNsight.trace`.
    """
    if not remote:
        return LocalBackend()
    made: Backend = _found("remote")(pool=pool, cluster=cluster, **sending)
    return made


def new_dataset(name: str, corpus: Any, *, text_field: str) -> NewDataset:
    """Read and check what a dump is to go through; see `storage.new_dataset` for what is raised."""
    made: NewDataset = _found("dataset")(name, corpus, text_field=text_field)
    return made


@cache
def _found(name: str) -> Callable[..., Any]:
    """What another part of this software offers: looked up once, since that reads the metadata of every package."""
    for entry in entry_points(group=GROUP, name=name):
        offered: Callable[..., Any] = entry.load()
        return offered
    raise NotFound(
        f"there is no {name} backend", next='install nnsight-hpc with its client: pip install "nnsight-hpc[client]"'
    )
