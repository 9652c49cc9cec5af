"""A leased graph on its way through the worker: read and checked before it runs, its result packed and written after it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnsight_hpc.execution.estimate import check_memory
from nnsight_hpc.execution.estimate_guard import Guard
from nnsight_hpc.execution.estimate_watch import Watch
from nnsight_hpc.execution.fake_model import twin_of
from nnsight_hpc.execution.structure import scheduled
from nnsight_hpc.execution.values import pack_values
from nnsight_hpc.graph.effort import effort
from nnsight_hpc.slurm.worker.model import Program
from nnsight_hpc.wire.errors import ExecutionFailed, InvalidInput, NotFound
from nnsight_hpc.wire.files import read_if_there

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    from nnsight_hpc.graph import Graph
    from nnsight_hpc.slurm.worker.allowance import Allowance
    from nnsight_hpc.wire.workers import Lease

MAX_FRAME = 4 << 30
"""Bytes of a request that are read at most; the daemon takes no larger ones."""


class Attempt:
    """A graph that is about to run. Raises the `HpcError` for which it must not.

    Parameters
    ----------
    budget
        Bytes that it may need beside the model.
    """

    def __init__(
        self,
        frame: memoryview,
        module: torch.nn.Module,
        budget: int,
        cancelled: Callable[[], bool],
        allowance: Allowance,
    ) -> None:
        self.cancelled, self.allowance = cancelled, allowance
        with effort(cancelled):
            self.program = Program.read(frame)
            scheduled(self.program.graph, local=False)  # refused or not, before its memory is estimated
        self.guard = guard_of(self.program.graph, self.program.tensors, module, budget, cancelled)

    def packed(self, values: Mapping[str, Any]) -> bytes:
        """What the graph has saved, as it is returned; raises `Denied` where that is more than may be."""
        self.allowance.check_values(values, self.program.graph)
        result = pack_values(values)
        self.allowance.check(len(result), "what the graph saves")
        return result


def guard_of(
    graph: Graph,
    tensors: Mapping[str, torch.Tensor],
    module: torch.nn.Module,
    budget: int,
    cancelled: Callable[[], bool],
) -> Guard:
    """What is left to check in the run. Raises `InvalidGraph` when the graph would take too much memory.

    An operation that cannot work is left to the run, which then says it in the same words as a run elsewhere; the
    estimate does not cover what comes after it, so every node is looked at then.
    """
    try:
        return check_memory(graph, tensors, module, budget, cancelled=cancelled)
    except ExecutionFailed:
        twin = twin_of(module)
        return Guard(twin, 0, frozenset(range(len(graph.nodes))), budget, Watch(twin.device, budget))


def frame_of(lease: Lease) -> memoryview:
    """The bytes of a request: those that came with its lease, or else a file's; raises `NotFound` and `InvalidInput`."""
    if lease.frame:
        return memoryview(lease.frame)
    path = Path(lease.request)
    data = read_if_there(path) if not path.exists() or path.stat().st_size <= MAX_FRAME else b""
    if data is None:
        raise NotFound("the request's bytes are not there", where=str(path), next="send it again")
    if not data:
        raise InvalidInput(f"the request has no bytes, or more than {MAX_FRAME}", where=str(path))
    return memoryview(data)
