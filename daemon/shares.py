"""What each user has had of the workers lately: seconds, of which half are forgotten in each half-life."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import sqlite3


class Usage(NamedTuple):
    """What a user had had at `time` (since the epoch), in seconds of a worker."""

    seconds: float = 0.0
    time: float = 0.0

    def at(self, now: float, half_life: float) -> float:
        return self.seconds * math.pow(0.5, max(0.0, now - self.time) / half_life)

    def rank(self, half_life: float) -> float:
        """The larger, the more he has had, at whatever time; it never falls."""
        return math.log2(self.seconds) + self.time / half_life if self.seconds > 0 else -math.inf


def charge(connection: sqlite3.Connection, user: str, seconds: float, half_life: float) -> Usage:
    """Count `seconds` of a worker as had by `user` just now, within a transaction of the caller."""
    found = connection.execute("SELECT seconds, time FROM usage WHERE user = ?", (user,)).fetchone()
    before = Usage(*found) if found else Usage()
    now = max(time.time(), before.time)  # a clock that was set back makes nobody's smaller
    usage = Usage(before.at(now, half_life) + seconds, now)
    connection.execute("INSERT OR REPLACE INTO usage (user, seconds, time) VALUES (?, ?, ?)", (user, *usage))
    return usage


def usages(connection: sqlite3.Connection) -> dict[str, Usage]:
    """That of every user."""
    found = connection.execute("SELECT user, seconds, time FROM usage")
    return {user: Usage(seconds, moment) for user, seconds, moment in found}
