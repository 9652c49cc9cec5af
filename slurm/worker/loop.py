"""The model's thread: one request after another, or several in one forward, each to an outcome. None ends the worker."""

from __future__ import annotations

import functools
import logging
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nnsight_hpc.execution.estimate_budget import memory_budget
from nnsight_hpc.execution.values import pack_values
from nnsight_hpc.models.devices import device_of
from nnsight_hpc.slurm.worker.allowance import Allowance
from nnsight_hpc.slurm.worker.attempt import Attempt, frame_of
from nnsight_hpc.slurm.worker.dumps import Dumps, Orders
from nnsight_hpc.slurm.worker.faults import changed_weights, end_of_gpu, free_memory, is_fatal, report_of
from nnsight_hpc.slurm.worker.model import Member, silent
from nnsight_hpc.slurm.worker.room import Room
from nnsight_hpc.slurm.worker.together import Together
from nnsight_hpc.slurm.worker.warmup import small_program
from nnsight_hpc.wire.errors import HpcError, InvalidInput, ReplicaFailed, RequestCancelled
from nnsight_hpc.wire.workers import Lease, Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from nnsight_hpc.slurm.worker.control import Control
    from nnsight_hpc.slurm.worker.courier import Courier
    from nnsight_hpc.slurm.worker.dumps import SlicesOf
    from nnsight_hpc.slurm.worker.model import Model
    from nnsight_hpc.slurm.worker.together import Ended, Say

_WAY = 0.001
"""Seconds for which the courier has the interpreter to itself, to send an outcome, before the model is put in order."""
_FRESH = 1.0
"""Seconds for which a look at the free memory holds: one takes as long as a small request waits for its model."""
logger = logging.getLogger(__name__)


class Runner:
    """Runs leased requests on the loaded model.

    Parameters
    ----------
    budget
        Bytes that one request may need beside the model; None: what is free.
    slices
        Gives what is leased of a dump its slices; None: no dumps are leased.
    """

    def __init__(self, model: Model, control: Control, budget: int | None, slices: SlicesOf | None = None) -> None:
        self._model, self._control, self._given = model, control, budget
        self._budget, self._looked = 0, float("-inf")
        self.room = Room()
        self._dumps = Dumps(model, slices, self.budget) if slices else None
        self._together = Together(model, control, self.room, self._unchanged)

    def warm_up(self) -> None:
        """Run a small graph as a request, so that nobody waits for what is imported and built at the first one only."""
        lease = Lease(id="warm-up", kind="run", attempt=1, request="", result="", user="")
        try:
            with self._unchanged(lease.id):
                self._run_graph(lease, memoryview(small_program(self._model.loaded).frame), silent, Allowance(None))
        except HpcError as error:  # the next request learns it, if it concerns it at all
            logger.warning("the worker could not warm up: %s", error)

    def serve(self, courier: Courier) -> None:
        """Run what the courier brings until it brings nothing more."""
        try:
            while (leases := courier.next()) is not None:
                self._control.busy(*(lease.id for lease in leases))
                for ended in self.run(leases, courier.datasets, courier.say):
                    courier.done(ended)
                    time.sleep(_WAY)
                self._control.ready()
                self._look_at_budget()
        finally:
            if self._dumps is not None:
                self._dumps.close()

    def run(self, leases: Sequence[Lease], datasets: Path, say: Say) -> Iterator[Ended]:
        """How requests ended, as soon as some have; those that may share forwards first, the others one by one.

        Parameters
        ----------
        datasets
            Where a dump writes its ``NAME.zarr``.
        say
            Takes each line that a request says.
        """
        left = {lease.id: lease for lease in leases}
        for ended in self._together.run(leases, self.budget(), say) if len(leases) > 1 else ():
            for lease, _ in ended:
                del left[lease.id]
            yield ended
        for lease in left.values():
            if self._control.failure:
                yield [(lease, None)]
                continue
            with self._unchanged(lease.id):  # the model is put in order while the outcome is on its way
                outcome = self._run(lease, datasets, functools.partial(say, lease.id))
                if outcome is not None and outcome.error is not None and self._control.failure is None:
                    free_memory()  # only now: until here the error's frames held what the request had
                yield [(lease, outcome)]

    def _run(self, lease: Lease, datasets: Path, say: Callable[[str, str], None]) -> Outcome | None:
        """The outcome of one request that runs alone; None when it was given up because the worker is to end."""
        begun = time.monotonic()
        try:
            result = self._result(lease, datasets, say)
        except RequestCancelled:
            if not self._control.was_cancelled(lease.id):
                return None
            return Outcome(id=lease.id, attempt=lease.attempt, cancelled=True, seconds=time.monotonic() - begun)
        except Exception as error:  # noqa: BLE001 - whatever it was, it becomes the request's error
            return self._failed(lease, error, time.monotonic() - begun)
        seconds = time.monotonic() - begun
        if result is None:
            return Outcome(id=lease.id, attempt=lease.attempt, gave_way=True, seconds=seconds)
        logger.info("%s (%s) done in %.3f s, %d bytes", lease.id, lease.kind, seconds, len(result))
        return Outcome(id=lease.id, attempt=lease.attempt, result=result, result_bytes=len(result), seconds=seconds)

    def _result(self, lease: Lease, datasets: Path, say: Callable[[str, str], None]) -> bytes | None:
        """None where a dump has given way."""
        frame, allowance = frame_of(lease), Allowance(lease.result_bytes)
        if lease.kind == "run":
            return self._run_graph(lease, frame, say, allowance)
        if lease.kind in ("dump", "part") and self._dumps is not None:
            orders = Orders(
                # A dump goes on where it was, so a draining worker need not wait hours for its end.
                cancelled=lambda: self._control.is_cancelled(lease.id) or self._control.draining.is_set(),
                gives_way=lambda: self._control.gives_way(lease.id),
                say=say if lease.kind == "dump" else silent,
            )
            summary = self._dumps.run(lease, frame, datasets, allowance, orders)
            return summary and (pack_values(summary) if lease.kind == "dump" else b"")
        raise InvalidInput(f"this worker cannot run requests of kind {lease.kind!r}", next="update nnsight-hpc")

    def _run_graph(
        self, lease: Lease, frame: memoryview, say: Callable[[str, str], None], allowance: Allowance
    ) -> bytes:
        cancelled = functools.partial(self._control.is_cancelled, lease.id)
        attempt = Attempt(frame, self._model.loaded.module, self.budget(), cancelled, allowance)
        member = Member(attempt.program, cancelled, allowance.counting(say), attempt.guard)
        return attempt.packed(self._model.run(member))

    def budget(self) -> int:
        """Bytes that may be needed now beside the model."""
        if self._given is not None:
            return self._given
        if time.monotonic() - self._looked > _FRESH:
            self._look_at_budget()
        return self._budget

    def _look_at_budget(self) -> None:
        self._budget = memory_budget(device_of(self._model.loaded.module)) // self._model.sharers
        self._looked = time.monotonic()

    @contextmanager
    def _unchanged(self, request: str) -> Iterator[None]:
        """Put back what a request leaves in the model beside its weights; end the worker when it has changed those."""
        try:
            yield
        finally:
            if not self._model.restore():
                self._control.fail(changed_weights(request))

    def _failed(self, lease: Lease, error: Exception, seconds: float) -> Outcome:
        logger.info("%s (%s) failed after %.3f s: %s", lease.id, lease.kind, seconds, error)
        report = Allowance(lease.result_bytes).cut(report_of(error))
        if isinstance(error, ReplicaFailed):  # raised by one of several ranks
            self._control.fail(error)
        elif is_fatal(error):
            self._control.fail(end_of_gpu(report, lease.id))
        return Outcome(id=lease.id, attempt=lease.attempt, error=report, seconds=seconds)
