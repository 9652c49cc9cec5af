"""Leased requests that share forwards. Whatever does not come out of one as it should is left to run alone, as any request."""

from __future__ import annotations

import functools
import logging
import time
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

from nnsight_hpc.graph.cobatch import batch_key
from nnsight_hpc.slurm.worker.allowance import Allowance
from nnsight_hpc.slurm.worker.attempt import Attempt, frame_of
from nnsight_hpc.slurm.worker.faults import free_memory, is_out_of_memory
from nnsight_hpc.slurm.worker.model import Member
from nnsight_hpc.wire.errors import HpcError, InvalidGraph, ReplicaFailed, RequestCancelled
from nnsight_hpc.wire.workers import Lease, Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager
    from typing import Any

    import torch

    from nnsight_hpc.slurm.worker.control import Control
    from nnsight_hpc.slurm.worker.model import Model
    from nnsight_hpc.slurm.worker.room import Room

    Say = Callable[[str, str, str], None]
    """Takes the request, a line that it says, and the user's line that said it."""
    Ended = list[tuple[Lease, Outcome | None]]
    """Requests with how they ended; None: given up, since the worker is to end."""

logger = logging.getLogger(__name__)


class _Seat(NamedTuple):
    """One request of a forward, with what it has said."""

    lease: Lease
    attempt: Attempt
    rows: int
    tokens: int
    said: list[tuple[str, str]]


class _End(NamedTuple):
    """How a request ended; None: it was given up, since the worker is to end."""

    outcome: Outcome | None


class Together:
    """Runs what can share a forward, as far as the memory goes.

    Parameters
    ----------
    unchanged
        Gives what guards the model while the named requests run.
    """

    def __init__(
        self,
        model: Model,
        control: Control,
        room: Room,
        unchanged: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        self._model, self._control, self._room, self._unchanged = model, control, room, unchanged

    def run(self, leases: Sequence[Lease], budget: int, say: Say) -> Iterator[Ended]:
        """How requests ended that shared a forward, forward by forward; the others are still to run, alone.

        Parameters
        ----------
        budget
            Bytes that all of a forward together may need beside the model.
        """
        for seats in self._groups(leases, budget):
            for part in self._fitting(seats, budget):
                if len(part) < 2 or self._control.failure:
                    continue
                begun = time.monotonic()
                try:
                    yield self._forward(part, say)
                except RequestCancelled as error:  # one of them, which has ended the forward for all
                    stopped = [seat for seat in part if seat.attempt.cancelled()]
                    seconds = (time.monotonic() - begun) / len(stopped)
                    yield self._ended(stopped, [error] * len(stopped), [seconds] * len(stopped))
                    yield from self.run([seat.lease for seat in part if seat not in stopped], budget, say)

    def _groups(self, leases: Sequence[Lease], budget: int) -> list[list[_Seat]]:
        """Those that may share a forward with one another."""
        groups: dict[str, list[_Seat]] = defaultdict(list)
        for lease in leases:
            try:
                key, seat = self._seat(lease, budget)
            except Exception as error:  # noqa: BLE001 - as it will be told when it runs alone
                logger.debug("%s does not share a forward: %s", lease.id, error)
            else:
                groups[key].append(seat)
        return [*groups.values()]

    def _seat(self, lease: Lease, budget: int) -> tuple[str, _Seat]:
        cancelled = functools.partial(self._control.is_cancelled, lease.id)
        frame, allowance = frame_of(lease), Allowance(lease.result_bytes)
        attempt = Attempt(frame, self._model.loaded.module, budget, cancelled, allowance)
        program = attempt.program
        found = batch_key(program.graph, _shapes(program.tensors), exclusive=False)
        if found is None or not attempt.guard.estimate:  # an operation in it cannot work
            raise InvalidGraph("its graph is not one that can")
        return found.key, _Seat(lease, attempt, found.rows, found.tokens, [])

    def _fitting(self, seats: Sequence[_Seat], budget: int) -> Iterator[list[_Seat]]:
        """The same in their order, in parts that there is room for."""
        part: list[_Seat] = []
        self._room.took(sum(seat.tokens for seat in seats), sum(seat.attempt.guard.estimate for seat in seats), budget)
        for seat in seats:
            memory = sum(one.attempt.guard.estimate for one in (*part, seat))
            tokens = sum(one.tokens for one in (*part, seat))
            if part and (memory > budget or tokens > self._room.tokens):
                yield part
                part = []
            part.append(seat)
        yield part

    def _forward(self, seats: list[_Seat], say: Say) -> Ended:
        begun = time.monotonic()
        with self._unchanged(", ".join(seat.lease.id for seat in seats)):
            results = self._results(seats)
        seconds = (time.monotonic() - begun) / sum(seat.rows for seat in seats)
        logger.info("%d requests shared a forward of %.3f s", len(seats), time.monotonic() - begun)
        if any(isinstance(result, Exception) and is_out_of_memory(result) for result in results):
            self._room.was_too_small()
            free_memory()
        ended = self._ended(seats, results, [seconds * seat.rows for seat in seats])
        left = {lease.id for lease, _ in ended}
        for seat in seats:  # only now: what runs alone after all says it again
            for line, source in seat.said if seat.lease.id in left else ():
                say(seat.lease.id, line, source)
        return ended

    def _results(self, seats: Sequence[_Seat]) -> Sequence[Mapping[str, Any] | Exception]:
        try:
            return self._model.run_together([_member(seat) for seat in seats])
        except RequestCancelled:
            raise
        except HpcError as error:  # one of several ranks could not go on: whose fault it is, each finds out alone
            if isinstance(error, ReplicaFailed):
                self._control.fail(error)
            return [error] * len(seats)

    def _ended(
        self, seats: Sequence[_Seat], results: Sequence[Mapping[str, Any] | Exception], seconds: Sequence[float]
    ) -> Ended:
        ends = map(self._end, seats, results, seconds)
        return [(seat.lease, end.outcome) for seat, end in zip(seats, ends, strict=True) if end is not None]

    def _end(self, seat: _Seat, result: Mapping[str, Any] | Exception, seconds: float) -> _End | None:
        """How it ended; None: it is to run alone."""
        lease = seat.lease
        if isinstance(result, RequestCancelled):
            cancelled = Outcome(id=lease.id, attempt=lease.attempt, cancelled=True, seconds=seconds)
            return _End(cancelled if self._control.was_cancelled(lease.id) else None)
        if isinstance(result, Exception):
            logger.info("%s runs alone: %s", lease.id, result, extra={"request": lease.id})
            return None
        try:
            packed = seat.attempt.packed(result)
        except Exception:  # noqa: BLE001 - which it meets again alone, and is told then
            return None
        size = len(packed)
        return _End(Outcome(id=lease.id, attempt=lease.attempt, result=packed, result_bytes=size, seconds=seconds))


def _member(seat: _Seat) -> Member:
    attempt = seat.attempt
    log = attempt.allowance.counting(lambda line, source: seat.said.append((line, source)))
    return Member(attempt.program, attempt.cancelled, log, attempt.guard)


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (str(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}
