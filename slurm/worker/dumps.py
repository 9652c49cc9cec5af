"""The dumps of a worker, whole or in part: each may give way to others, and be gone on with."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from nnsight_hpc.slurm.worker.attempt import guard_of
from nnsight_hpc.slurm.worker.dump import dump
from nnsight_hpc.slurm.worker.dump_job import Job
from nnsight_hpc.slurm.worker.measure import measure
from nnsight_hpc.slurm.worker.model import Member, Program, silent
from nnsight_hpc.slurm.worker.scribe import Hands
from nnsight_hpc.wire.messages import encode
from nnsight_hpc.wire.names import dump_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import torch

    from nnsight_hpc.execution.estimate import Guard
    from nnsight_hpc.graph import Graph
    from nnsight_hpc.slurm.worker.allowance import Allowance
    from nnsight_hpc.slurm.worker.dump import Steps
    from nnsight_hpc.slurm.worker.model import Model
    from nnsight_hpc.slurm.worker.slices import SharedSlices
    from nnsight_hpc.wire.workers import Lease

    SlicesOf = Callable[[Lease], SharedSlices]

logger = logging.getLogger(__name__)


class Orders(NamedTuple):
    """What a lease is told while it runs, and who takes what it says."""

    cancelled: Callable[[], bool]
    gives_way: Callable[[], bool]
    say: Callable[[str, str], None] = silent


class _Open:
    """A dump that this worker writes, or has paused; it may have been leased as a part first, and whole when it comes back.

    Attributes
    ----------
    orders
        Those of the lease that it runs for just now.
    rest
        What is left of it.
    """

    rest: Steps

    def __init__(self, dump: str, slices: SharedSlices, orders: Orders) -> None:
        self.dump, self.slices, self.orders = dump, slices, orders

    def is_cancelled(self) -> bool:
        return self.orders.cancelled()

    def say(self, text: str, source: str) -> None:
        self.orders.say(text, source)


class Dumps:
    """Runs dumps. One that gave way stays open, and goes on where it was if it comes back before another one.

    Parameters
    ----------
    slices
        Gives what is leased its slices.
    budget
        Bytes that a batch may need beside the model; None: nobody looks.
    """

    def __init__(self, model: Model, slices: SlicesOf, budget: Callable[[], int] | None = None) -> None:
        self._model, self._slices, self._budget = model, slices, budget
        self._paused: _Open | None = None

    def run(
        self,
        lease: Lease,
        frame: bytes | memoryview,
        datasets: Path,
        allowance: Allowance,
        orders: Orders,
    ) -> dict[str, Any] | None:
        """As `dump`, or the plan of one; None when it was told after a batch that others are to go first."""
        found = self._resumed(lease, orders)
        if found is None:
            found = _Open(dump_of(lease.id), self._slices(lease), orders)
            found.rest = self._begun(found, frame, datasets, allowance, begins=lease.kind != "part")
        while True:
            try:
                next(found.rest)
            except StopIteration as end:
                return cast("dict[str, Any]", end.value)
            if orders.gives_way():
                self._paused = found
                logger.info("%s gives way", lease.id)
                return None

    def close(self) -> None:
        """Give up what has paused: whoever goes on with it begins its slice anew."""
        paused, self._paused = self._paused, None
        if paused is not None:
            paused.rest.close()

    def _resumed(self, lease: Lease, orders: Orders) -> _Open | None:
        if self._paused is None or dump_of(lease.id) != self._paused.dump:
            self.close()
            return None
        paused, self._paused = self._paused, None
        paused.slices.resume(lease)
        paused.orders = orders
        return paused

    def _begun(
        self, opened: _Open, frame: bytes | memoryview, datasets: Path, allowance: Allowance, *, begins: bool
    ) -> Steps:
        model, cancelled = self._model, opened.is_cancelled
        guards = _Guards(model.loaded.module, self._budget, cancelled)
        log = allowance.counting(opened.say)

        def member(graph: Graph, tensors: Mapping[str, torch.Tensor]) -> Member:
            return Member(Program(graph, tensors), cancelled, log, guards.of(graph, tensors))

        def run(graph: Graph, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
            return model.run(member(graph, tensors))

        def write(graph: Graph, tensors: Mapping[str, torch.Tensor]) -> None:
            model.write(member(graph, tensors))

        job = Job.read(frame, model.loaded)
        if job.spec.measure:
            return {"plan": encode(measure(job, model.loaded, run, datasets, cancelled)).decode()}
        hands = Hands(run, write, model.scribe)
        return (
            yield from dump(
                job, model.loaded, hands, datasets, allowance, cancelled=cancelled, slices=opened.slices, begins=begins
            )
        )


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
