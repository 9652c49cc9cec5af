"""What has happened to pools and requests, in words and with times, for those who ask why something is as it is.

A subject is named as in `changes.Changes`: ``pool:NAME`` or ``request:ID``. Its story stays when the pool is gone.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from nnsight_hpc.wire.messages import Event

if TYPE_CHECKING:
    import sqlite3

    from nnsight_hpc.daemon.store import Store
    from nnsight_hpc.daemon.table import Row

_KEPT = 500
"""So many of the latest events of a subject are remembered."""
_FORGET = """DELETE FROM events WHERE subject = :subject AND sequence <=
    (SELECT sequence FROM events WHERE subject = :subject ORDER BY sequence DESC LIMIT 1 OFFSET :kept)"""


class Stories:
    """The table of events."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def tell(self, subject: str, text: str, replica: str = "") -> None:
        """Remember that something happened just now, soon and in this order; nobody waits for the disk."""
        event = Event(time=time.time(), text=text, replica=replica)
        self._store.post(lambda connection: record(connection, subject, event))

    async def of(self, subject: str) -> list[Event]:
        """The oldest first."""
        query = "SELECT time, text, replica FROM events WHERE subject = ? ORDER BY sequence"
        rows = await self._store.run(lambda connection: connection.execute(query, (subject,)).fetchall())
        return [Event(time=row["time"], text=row["text"], replica=row["replica"]) for row in rows]


def record(connection: sqlite3.Connection, subject: str, event: Event) -> None:
    """Write an event down within a transaction of the caller, and forget what is too long ago."""
    values = (subject, event.time, event.text, event.replica)
    connection.execute("INSERT INTO events (subject, time, text, replica) VALUES (?, ?, ?, ?)", values)
    connection.execute(_FORGET, {"subject": subject, "kept": _KEPT})


def tell_of(connection: sqlite3.Connection, row: Row, text: str) -> None:
    """Write down what happened to a request, within the transaction in which it does."""
    record(connection, f"request:{row.id}", Event(time=time.time(), text=text, replica=row.replica))
