"""The slices of a dump that runs: which are written, which wait, and which worker writes which; in memory only.

What is true stands on disk: a slice is written when its manifest says so. This is who does what meanwhile, so that several
workers write one dataset and no two of them the same slice; where they do nevertheless (one was taken for dead), the bytes
are the same, and only work is lost. What one call costs does not depend on how many workers or slices there are.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import TYPE_CHECKING

import msgspec

from nnsight_hpc.wire.errors import InvalidInput
from nnsight_hpc.wire.messages import DumpProgress
from nnsight_hpc.wire.workers import SliceProgress

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nnsight_hpc.wire.workers import SlicesOpened


class SliceQueue:
    """Hands out slices in their order, those that came back last.

    Attributes
    ----------
    overflows
        Values that became infinite, by capture, as far as workers have told.
    """

    def __init__(self, opened: SlicesOpened) -> None:
        self.slices, self._count = opened.slices, 0
        self._is_written = bytearray(opened.slices)
        self._waiting = deque(range(opened.slices))  # may also name some that do not wait any more
        self._doing: dict[str, SliceProgress] = {}
        self._holders: dict[int, str] = {}
        self._done = DumpProgress()
        self.overflows: Counter[str] = Counter()
        self._run_tokens = self._padded_tokens = 0
        self.open(opened)

    def open(self, opened: SlicesOpened) -> None:
        """A worker has looked at what is written; what was known to be written stays so."""
        if opened.slices != self.slices:
            raise InvalidInput(f"the dataset has {opened.slices} slices, and had {self.slices} before")
        for number in opened.written:
            self._write(number)
        if opened.progress.tokens >= self._done.tokens:
            self._done = opened.progress

    @property
    def written(self) -> int:
        """How many slices are on disk."""
        return self._count

    @property
    def waiting(self) -> int:
        """How many slices nobody writes or has written."""
        return self.slices - self._count - len(self._holders)

    @property
    def padding(self) -> float:
        """Which part of what was run is padding, as far as workers have told."""
        return 1 - self._run_tokens / self._padded_tokens if self._padded_tokens else 0.0

    @property
    def complete(self) -> bool:
        return self._count == self.slices

    def next(self, worker: str, begun: int | None = None) -> int | None:
        """The slice that `worker` is to write now; None where none waits.

        What it was given before and has not written comes again: the answer was lost, or it has paused. `begun` is what
        it has begun without our knowing, or before it was paused: its own still unless somebody else has it now.
        """
        if (mine := self._doing.get(worker)) is not None:
            return mine.slice
        number = begun if begun is not None and self._waits(begun) else self._first()
        if number is not None:
            self._give(worker, SliceProgress(slice=number))
        return number

    def report(self, worker: str, progress: SliceProgress) -> None:
        """How far a worker is; one that is not known to write has begun the slice before this queue was made."""
        mine = self._doing.get(worker)
        if mine is None and self._waits(progress.slice):
            self._give(worker, progress)
        elif mine is not None and mine.slice == progress.slice:
            self._doing[worker] = progress

    def wrote(self, progress: SliceProgress) -> None:
        """A slice is on disk, whoever it was given to; said twice it counts once."""
        if self._write(progress.slice):
            self._done = _sum(self._done, progress)
            self.overflows.update(progress.overflows)
            self._run_tokens += progress.run_tokens
            self._padded_tokens += progress.padded_tokens

    def give_back(self, worker: str) -> None:
        """It does not write any more: what it has not finished waits again, behind all others."""
        if (mine := self._doing.pop(worker, None)) is not None:
            del self._holders[mine.slice]
            self._waiting.append(mine.slice)

    def progress(self) -> DumpProgress:
        """How far the dump is, counting what is written of slices that are not finished."""
        done = self._done
        for doing in self._doing.values():
            done = _sum(done, doing)
        speed = sum(doing.speed for doing in self._doing.values())
        return msgspec.structs.replace(done, speed=speed, workers=len(self._doing))

    def doing(self) -> Mapping[str, SliceProgress]:
        """What each worker writes, and how far it is."""
        return self._doing

    def _first(self) -> int | None:
        while self._waiting:
            if self._waits(number := self._waiting.popleft()):
                return number
        return None

    def _waits(self, number: int) -> bool:
        if not 0 <= number < self.slices:
            raise InvalidInput(f"there is no slice {number}", why=f"the dataset has {self.slices}")
        return not self._is_written[number] and number not in self._holders

    def _give(self, worker: str, progress: SliceProgress) -> None:
        self._doing[worker], self._holders[progress.slice] = progress, worker

    def _write(self, number: int) -> bool:
        """Note that a slice is written, and that nobody has to write it; False where that was known."""
        self._waits(number)  # there is one
        if (holder := self._holders.pop(number, None)) is not None:
            del self._doing[holder]
        if self._is_written[number]:
            return False
        self._is_written[number] = True
        self._count += 1
        return True


def _sum(done: DumpProgress, more: SliceProgress) -> DumpProgress:
    return msgspec.structs.replace(
        done,
        documents=done.documents + more.documents,
        tokens=done.tokens + more.tokens,
        bytes=done.bytes + more.bytes,
    )
