"""Traces that run on the ranks of a replica, while the plain module of the test process stays the oracle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nnsight_hpc import LanguageModel
from nnsight_hpc.execution.values import save_tensors, unpack_values
from nnsight_hpc.wire.errors import from_report
from nnsight_hpc.wire.frames import pack
from tests.oracle.hooks import counters
from tests.parallel.replica import Question

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import torch

    from nnsight_hpc.graph import Graph
    from nnsight_hpc.tracing import NNsight
    from tests.parallel.replica import Replica


class RanksBackend:
    """Runs graphs on the model in a folder, spread over the ranks of a replica.

    Parameters
    ----------
    options
        Those of a `Question`.

    Attributes
    ----------
    asked
        How many graphs were sent to the ranks.
    """

    remote = True

    def __init__(self, replica: Callable[[], Replica], folder: Path, **options: Any) -> None:
        self._replica, self._folder, self._options = replica, folder, options
        self.asked = 0

    def run(self, graph: Graph, tensors: Mapping[str, torch.Tensor], model: NNsight, **local: Any) -> dict[str, Any]:
        frame = pack(graph.to_json().encode(), save_tensors(tensors))
        if counters:
            self._ask(frame)  # ranks learn the form of a call in forwards of their own, which are not to count
        answer, result = self._ask(frame, counted=bool(counters))
        for ran in counters:
            ran.extend(answer.ran)
        for line in answer.said:
            print(line)
        if answer.error is not None:
            raise from_report(answer.error)
        return unpack_values(result)

    def _ask(self, frame: bytes, *, counted: bool = False):
        self.asked += 1
        return self._replica().ask(Question(model=str(self._folder), counted=counted, **self._options), frame)


class OnRanks(LanguageModel):
    """A language model whose traces run on ranks."""

    def __init__(self, module: torch.nn.Module, ranks: RanksBackend, **kwargs: Any) -> None:
        super().__init__(module, **kwargs)
        self._ranks = ranks

    def _backend(self, **_where: Any) -> RanksBackend:
        return self._ranks
