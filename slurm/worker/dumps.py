"""The dumps of a worker: each a request that may give way to others, and be gone on with."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from nnsight_hpc.slurm.worker.attempt import guard_of
from nnsight_hpc.slurm.worker.dump import dump
from nnsight_hpc.slurm.worker.dump_job import Job
from nnsight_hpc.slurm.worker.measure import measure
from nnsight_hpc.slurm.worker.model import Program, silent
from nnsight_hpc.wire.messages import encode

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import torch

    from nnsight_hpc.execution.estimate import Guard
    from nnsight_hpc.graph import Graph
    from nnsight_hpc.slurm.worker.allowance import Allowance
    from nnsight_hpc.slurm.worker.dump import Steps
    from nnsight_hpc.slurm.worker.model import Model
    from nnsight_hpc.wire.messages import DumpProgress
    from nnsight_hpc.wire.workers import Lease

logger = logging.getLogger(__name__)


class _Paused(NamedTuple):
    """A dump that has given way: which attempt at which request, and what is left of it."""

    request: str
    attempt: int
    rest: Steps


class Dumps:
    """Runs dumps. One that gave way stays open, and goes on where it was if it comes back before anything else.

    Parameters
    ----------
    budget
        Bytes that a batch may need beside the model; None: nobody looks.
    """

    def __init__(self, model: Model, budget: Callable[[], int] | None = None) -> None:
        self._model, self._budget = model, budget
        self._paused: _Paused | None = None

    def run(
        self,
        lease: Lease,
        frame: bytes | memoryview,
        datasets: Path,
        allowance: Allowance,
        *,
        cancelled: Callable[[], bool],
        gives_way: Callable[[], bool],
        progress: Callable[[DumpProgress], None],
        say: Callable[[str, str], None] = silent,
    ) -> dict[str, Any] | None:
        """As `dump`, or the plan of one; None when `gives_way` has said after a batch that others are to go first."""
        rest = self._resumed(lease) or self._begun(
            frame, datasets, allowance, cancelled=cancelled, progress=progress, say=say
        )
        while True:
            try:
                next(rest)
            except StopIteration as end:
                return cast("dict[str, Any]", end.value)
            if gives_way():
                self._paused = _Paused(lease.id, lease.attempt, rest)
                logger.info("%s gives way", lease.id)
                return None

    def _resumed(self, lease: Lease) -> Steps | None:
        paused, self._paused = self._paused, None
        if paused is None:
            return None
        if (lease.id, lease.attempt) == (paused.request, paused.attempt + 1):
            return paused.rest
        paused.rest.close()  # whoever goes on with it begins its slice anew
        return None

    def _begun(
        self,
        frame: bytes | memoryview,
        datasets: Path,
        allowance: Allowance,
        *,
        cancelled: Callable[[], bool],
        progress: Callable[[DumpProgress], None],
        say: Callable[[str, str], None],
    ) -> Steps:
        model, budget = self._model, self._budget
        guards = _Guards(model.loaded.module, budget, cancelled)
        log = allowance.counting(say)

        def run(graph: Graph, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
            guard = guards.of(graph, tensors)
            return model.run(Program(graph, tensors), cancelled=cancelled, log=log, guard=guard)

        job = Job.read(frame, model.loaded)
        if job.spec.measure:
            return {"plan": encode(measure(job, model.loaded, run, datasets, cancelled)).decode()}
        return (yield from dump(job, model.loaded, run, datasets, allowance, cancelled=cancelled, progress=progress))


class _Guards:
    """The memory of a graph is estimated for the largest batch so far: others of the plan need no more."""

    def __init__(
        self, module: torch.nn.Module, budget: Callable[[], int] | None, cancelled: Callable[[], bool]
    ) -> None:
        self._module, self._budget, self._cancelled = module, budget, cancelled
        self._most = (0, 0)
        self._guard: Guard | None = None

    def of(self, graph: Graph, tensors: Mapping[str, torch.Tensor]) -> Guard | None:
        """Raises `InvalidGraph` where a batch would take too much."""
        size, longest = tensors["input_ids"].numel(), tensors["input_ids"].shape[1]
        if self._budget is not None and (size > self._most[0] or longest > self._most[1]):
            self._guard = guard_of(graph, tensors, self._module, self._budget(), self._cancelled)
            self._most = max(size, self._most[0]), max(longest, self._most[1])
        return self._guard
