"""The results that are kept: small ones beside their rows at first, all others, and old ones, in files.

A user's oldest ones make room for new ones.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from nnsight_hpc.daemon import small, table
from nnsight_hpc.daemon.room import Room, remove_oldest
from nnsight_hpc.wire.files import write_atomically

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Sequence
    from pathlib import Path

    from nnsight_hpc.daemon.request_files import RequestFiles
    from nnsight_hpc.daemon.store import Store
    from nnsight_hpc.daemon.table import Row

_AT_ONCE = 200
"""Results that are moved at once, so that those who wait for the database do not wait long."""


class Results:
    """All results.

    Parameters
    ----------
    most
        Bytes of one user's.
    """

    def __init__(self, store: Store, files: RequestFiles, most: int) -> None:
        self._store, self._files, self._room = store, files, Room(most)

    async def load(self) -> None:
        await self._store.run(self._room.load)

    async def keep(self, row: Row) -> None:
        """A request has completed: where its user has too much now, his oldest results go."""
        self._room.take(row)
        lacks = self._room.lacks(row.user)
        for old in await self._store.run(lambda c: remove_oldest(c, row.user, lacks)) if lacks else []:
            self._room.give(old)
            self._files.result(old.id, old.attempt).unlink(missing_ok=True)

    def forgotten(self, row: Row) -> None:
        """A completed request is forgotten."""
        self._room.give(row)

    async def in_file(self, row: Row) -> Path:
        """The file with the result of a completed request."""
        if frame := await self._store.run(lambda c: small.result(c, row)):
            await self._move([(row, frame)])
        return self._files.result(row.id, row.attempt)

    async def settle(self, before: float) -> None:
        """Put into files what ended before that time: the next daemon is to copy a small database."""
        while found := await self._store.run(lambda c: _old(c, before)):
            await self._move(found)

    async def _move(self, results: Sequence[tuple[Row, bytes]]) -> None:
        for row, frame in results:
            await asyncio.to_thread(write_atomically, self._files.result(row.id, row.attempt), frame)

        def drop(connection: sqlite3.Connection) -> None:
            for row, _ in results:
                small.drop_result(connection, row)

        await self._store.run(drop)


def _old(connection: sqlite3.Connection, before: float) -> list[tuple[Row, bytes]]:
    """Some of the results in the database, of requests that ended before that time."""
    where = "sequence IN (SELECT sequence FROM results) AND ended < ?"
    rows = table.select(connection, where, before, tail=f"LIMIT {_AT_ONCE}")
    return [(row, small.result(connection, row)) for row in rows]
