"""Slices that several workers of one process share, by the queue that a daemon has, without a daemon."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nnsight_hpc.slurm.worker.slices import Turn
from nnsight_hpc.storage.slice_queue import SliceQueue

if TYPE_CHECKING:
    from collections.abc import Callable

    from nnsight_hpc.wire.messages import DumpProgress
    from nnsight_hpc.wire.workers import Lease, SliceProgress, SlicesOpened


class Board:
    """What a daemon knows of one dump; `progress` hears it at each change."""

    def __init__(self, progress: Callable[[DumpProgress], None] = lambda _: None) -> None:
        self.queue: SliceQueue | None = None
        self.progress = progress

    def slices(self, worker: str) -> Callable[[Lease], FromBoard]:
        """What `Dumps` takes for a worker of that name."""
        return lambda lease: FromBoard(self, worker, lease)


class FromBoard:
    """As `SharedSlices`."""

    def __init__(self, board: Board, worker: str, lease: Lease) -> None:
        self._board, self._worker, self._lease = board, worker, lease

    @property
    def overflows(self) -> dict[str, int]:
        return dict(self._board.queue.overflows) if self._board.queue else {}

    @property
    def padding(self) -> float:
        return self._board.queue.padding if self._board.queue else 0.0

    def resume(self, lease: Lease) -> None:
        self._lease = lease

    def open(self, found: Callable[[], SlicesOpened]) -> None:
        if self._board.queue is None:
            self._board.queue = SliceQueue(found())
        else:
            self._board.queue.open(found())
        self._told()

    def next(self, written: SliceProgress | None) -> int | Turn:
        if written is not None:
            self._board.queue.wrote(written)
            self._told()
        helps = self._lease.kind == "part"
        if self._board.queue.complete:
            return Turn.LEAVE if helps else Turn.COMPLETE
        number = self._board.queue.next(self._worker)
        if number is None:
            return Turn.LEAVE if helps else Turn.WAIT
        return number

    def keeps(self, number: int) -> bool:
        return self._board.queue.next(self._worker, number) == number

    def report(self, progress: SliceProgress) -> None:
        self._board.queue.report(self._worker, progress)
        self._told()

    def _told(self) -> None:
        self._board.progress(self._board.queue.progress())
