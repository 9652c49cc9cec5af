"""Which worker holds which request: what workers tell every few seconds, and so is kept in memory only."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from nnsight_hpc.wire.states import RequestState

if TYPE_CHECKING:
    from collections.abc import Iterable

    from nnsight_hpc.daemon.table import Row


class Held:
    """What is known of a leased request: when its worker last named it, whether it is to be given up, or a dump to pause.

    One of the kind ``part`` is no request of its own: its worker helps with a dump.
    `share` is which part of its worker's time it takes, as far as known. `quiet`: it is known to have said nothing.
    """

    def __init__(self, row: Row, share: float, *, quiet: bool) -> None:
        self.id, self.kind, self.pool, self.user, self.share = row.id, row.kind, row.pool, row.user, share
        self.replica, self.attempt, self.cancel = row.replica, row.attempt, row.cancel
        self.pause = row.paused
        self.seen, self.quiet = time.monotonic(), quiet
        self.begin(row)

    def begin(self, row: Row) -> None:
        """It was given to its worker, or runs there now."""
        self.begun, self.since = row.state == RequestState.RUNNING, row.times[row.state]

    @property
    def is_dump(self) -> bool:
        """Whether it writes a dataset, whole or in part."""
        return self.kind in ("dump", "part")


class Holdings:
    """All requests that are leased."""

    def __init__(self) -> None:
        self._held: dict[str, Held] = {}

    def take(self, row: Row, share: float = 1.0, *, quiet: bool = False) -> None:
        self._held[row.id] = Held(row, share, quiet=quiet)

    def drop(self, request: str) -> Held | None:
        return self._held.pop(request, None)

    def find(self, request: str) -> Held | None:
        return self._held.get(request)

    def named(self, request: str, replica: str) -> Held | None:
        """`replica` has just said that it holds `request`; None when it is not the one that was given it."""
        held = self._held.get(request)
        if held is None or held.replica != replica:
            return None
        held.seen = time.monotonic()
        return held

    def hear_all(self) -> None:
        """Nobody could be heard for a while, so nobody was silent."""
        for held in self._held.values():
            held.seen = time.monotonic()

    def all(self) -> Iterable[Held]:
        return self._held.values()

    def dumping(self, pool: str) -> set[str]:
        """The replicas of the pool that have a dump, or a part of one."""
        return {held.replica for held in self._held.values() if held.pool == pool and held.is_dump}

    def not_begun(self, replica: str) -> list[str]:
        """What that replica was given, and has not begun; one that is to be given up it need not begin."""
        mine = (held for held in self._held.values() if held.replica == replica and held.kind != "part")
        return [held.id for held in mine if not held.begun and not held.cancel]

    def of(self, replica: str) -> list[str]:
        return [name for name, held in self._held.items() if held.replica == replica]

    def cancelled(self, replica: str) -> tuple[str, ...]:
        """What that replica is to give up."""
        return tuple(name for name, held in self._held.items() if held.replica == replica and held.cancel)

    def silent(self, seconds: float) -> list[str]:
        """What no worker has named for so long."""
        limit = time.monotonic() - seconds
        return [name for name, held in self._held.items() if held.seen < limit]
