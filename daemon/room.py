"""How much of the disk each user's results take, and which are removed when they take more than they may: the oldest."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from nnsight_hpc.daemon import small, table
from nnsight_hpc.daemon.story import tell_of

if TYPE_CHECKING:
    import sqlite3

    from nnsight_hpc.daemon.table import Row

_REMOVED = "its result was removed, since newer ones of its user needed the room"


class Room:
    """The bytes of the results that are kept, by user.

    Parameters
    ----------
    most
        So many of one user.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken: Counter[str] = Counter()

    def load(self, connection: sqlite3.Connection) -> None:
        query = "SELECT user, sum(result_bytes) FROM requests WHERE state = 'COMPLETED' GROUP BY user"
        self._taken = Counter(dict(connection.execute(query).fetchall()))

    def take(self, row: Row) -> None:
        self._taken[row.user] += row.result_bytes

    def give(self, row: Row) -> None:
        self._taken[row.user] -= row.result_bytes

    def lacks(self, user: str) -> int:
        """So many bytes of his results are too many."""
        return max(0, self._taken[user] - self._most)


def remove_oldest(connection: sqlite3.Connection, user: str, lacks: int) -> list[Row]:
    """Forget the user's oldest results but for the newest one, until so many bytes are free; the rows as they were."""
    rows = table.select(connection, "user = ? AND state = 'COMPLETED' AND result_bytes > 0", user)
    removed = []
    for row in rows[:-1]:
        if lacks <= 0:
            break
        lacks -= row.result_bytes
        table.update(connection, row, result_bytes=0, note=_REMOVED)
        small.drop_result(connection, row)
        tell_of(connection, row, _REMOVED)
        removed.append(row)
    return removed
