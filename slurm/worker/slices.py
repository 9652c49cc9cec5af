"""Which slice of a dump is to be written next: a process alone decides that itself, workers ask the daemon.

The daemon may be away, as it may at any time. A worker that has a dump then goes on alone with what is not on disk yet,
from the end, where nobody else is likely to be at work; one that only helps waits.
"""

from __future__ import annotations

import enum
import logging
import time
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from urllib.parse import urlencode

from nnsight_hpc.slurm.worker.link import Backoff
from nnsight_hpc.storage.slice_queue import SliceQueue
from nnsight_hpc.wire.errors import Conflict, HpcError, NotFound, RequestCancelled
from nnsight_hpc.wire.workers import SliceAsk, SliceGiven

if TYPE_CHECKING:
    from collections.abc import Callable

    import msgspec

    from nnsight_hpc.slurm.worker.control import Control
    from nnsight_hpc.slurm.worker.link import Link
    from nnsight_hpc.wire.messages import DumpProgress
    from nnsight_hpc.wire.workers import Lease, SliceProgress, SlicesOpened

T = TypeVar("T")
_POLL = 20.0
"""Seconds that the daemon may hold a question while all slices are with others."""
logger = logging.getLogger(__name__)


class Turn(enum.Enum):
    """What a worker is to do that is given no slice."""

    WAIT = enum.auto()  # others write the last ones: ask again
    COMPLETE = enum.auto()  # all are written: finish the dataset
    LEAVE = enum.auto()  # others go on with it


class Slices(Protocol):
    """The slices of one dump, as one worker is given them.

    Attributes
    ----------
    overflows
        Once `next` has said `Turn.COMPLETE`: those of all slices, by capture.
    padding
        Likewise: which part of what was run for them is padding.
    """

    @property
    def overflows(self) -> dict[str, int]: ...

    @property
    def padding(self) -> float: ...

    def open(self, found: Callable[[], SlicesOpened]) -> None:
        """Begin; `found` looks at what is on disk, now and whenever that is to be known again."""

    def next(self, written: SliceProgress | None) -> int | Turn:
        """The slice to write now; `written` is the one that was written since the last call, if one was."""

    def keeps(self, number: int) -> bool:
        """Whether a slice that was begun is this worker's still, after others may have gone first."""

    def report(self, progress: SliceProgress) -> None:
        """How far the slice is that is being written."""


class OwnSlices:
    """All slices, for a process that is alone with the dataset; `progress` hears how far the whole is."""

    def __init__(self, progress: Callable[[DumpProgress], None]) -> None:
        self._progress = progress
        self._queue: SliceQueue | None = None

    @property
    def overflows(self) -> dict[str, int]:
        return dict(self._queue.overflows) if self._queue else {}

    @property
    def padding(self) -> float:
        return self._queue.padding if self._queue else 0.0

    def open(self, found: Callable[[], SlicesOpened]) -> None:
        self._queue = SliceQueue(found())
        self._progress(self._queue.progress())

    def next(self, written: SliceProgress | None) -> int | Turn:
        if self._queue is None:
            return Turn.WAIT
        if written is not None:
            self._queue.wrote(written)
            self._progress(self._queue.progress())
        number = self._queue.next("")
        return Turn.COMPLETE if number is None else number

    def keeps(self, number: int) -> bool:  # noqa: ARG002 - nobody else is there to have it
        return True

    def report(self, progress: SliceProgress) -> None:
        if self._queue is not None:
            self._queue.report("", progress)
            self._progress(self._queue.progress())


class SharedSlices:
    """Slices that the daemon gives out, for what a worker has leased: a dump, or a part of one.

    Raises `RequestCancelled` where the daemon wants nothing of this worker any more.

    Parameters
    ----------
    control
        Takes how far the slice is that is being written; another thread tells the daemon.
    """

    def __init__(self, link: Link, control: Control, lease: Lease) -> None:
        self._link, self._control, self._lease = link, control, lease
        self.overflows: dict[str, int] = {}
        self.padding = 0.0
        self._resumed = False
        self._next: int | None = None
        self._backoff = Backoff()

    def resume(self, lease: Lease) -> None:
        """Go on under another lease, after others went first: what was begun may be theirs by now."""
        self._lease, self._resumed = lease, True

    def open(self, found: Callable[[], SlicesOpened]) -> None:
        self._found = found
        self._tell()

    def next(self, written: SliceProgress | None) -> int | Turn:
        if self._next is not None:
            number, self._next = self._next, None
            return number
        return self._ask(SliceAsk(written=written))

    def keeps(self, number: int) -> bool:
        if not self._resumed:
            return True
        self._resumed = False
        turn = self._ask(SliceAsk(begun=number))
        self._next = turn if isinstance(turn, int) and turn != number else None
        return turn == number

    def report(self, progress: SliceProgress) -> None:
        self._control.progress(progress)

    def _ask(self, ask: SliceAsk) -> int | Turn:
        given = self._given(ask)
        while given is not None and not given.known:
            self._tell()
            given = self._given(ask)
        if given is None:
            return self._without_daemon(ask)
        self._backoff, self.overflows, self.padding = Backoff(), given.overflows, given.padding
        if given.leave:
            return Turn.LEAVE
        if given.complete:
            return Turn.COMPLETE
        return Turn.WAIT if given.slice is None else given.slice

    def _given(self, ask: SliceAsk) -> SliceGiven | None:
        return self._call(f"slice?wait={_POLL:g}&", ask, SliceGiven)

    def _tell(self) -> None:
        """Say what is on disk."""
        self._call("slices?", self._found(), dict[str, Any])

    def _call(self, path: str, message: msgspec.Struct, as_type: type[T]) -> T | None:
        """The daemon's answer; None while it is away."""
        whose = urlencode({"replica": self._control.replica, "id": self._lease.id})
        try:
            return self._link.once(f"/w1/{path}{whose}", message, as_type, timeout=_POLL + 15)
        except (Conflict, NotFound) as error:
            raise RequestCancelled(f"{self._lease.id} is no longer this worker's", why=error.what) from None
        except HpcError as error:
            logger.info("the daemon gives no slices just now: %s", error.what)
            return None

    def _without_daemon(self, ask: SliceAsk) -> int | Turn:
        if ask.begun is not None:
            return ask.begun
        if self._lease.kind == "part":
            time.sleep(self._backoff.next())
            return Turn.WAIT
        found = self._found()
        return max({*range(found.slices)}.difference(found.written), default=Turn.COMPLETE)
