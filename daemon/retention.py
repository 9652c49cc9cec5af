"""Requests that ended long ago are forgotten, with their stories, results and logs."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import msgspec

from nnsight_hpc.daemon import table
from nnsight_hpc.storage import dataset_folder
from nnsight_hpc.wire.states import RequestState

if TYPE_CHECKING:
    import sqlite3
    from pathlib import Path

    from nnsight_hpc.daemon.config import Config
    from nnsight_hpc.daemon.request_files import RequestFiles
    from nnsight_hpc.daemon.results import Results
    from nnsight_hpc.daemon.store import Store
    from nnsight_hpc.daemon.table import Row

_AT_ONCE = 500
"""Requests in one transaction, so that those who wait for the database do not wait long."""
_SETTLE = 3600.0
"""Seconds after which a small result goes from the database, which the next daemon copies, to a file."""
_OLD = "ended > 0 AND ended < ?"


class Retention:
    """Forgets what ended more than `Config.keep` ago."""

    def __init__(self, store: Store, results: Results, files: RequestFiles, config: Config) -> None:
        self._store, self._results, self._files, self._config = store, results, files, config

    async def forget_old(self) -> None:
        """Forget rows, stories, results and logs; what ended a while ago goes out of the database's way."""
        await self._results.settle(time.time() - _SETTLE)
        before, datasets = time.time() - self._config.keep, self._config.places.datasets
        while rows := await self._store.run(lambda c: forget(c, before, datasets)):
            for row in rows:
                if row.state == RequestState.COMPLETED:
                    self._results.forgotten(row)
            await asyncio.to_thread(self._files.remove, rows)
        await self._store.run(lambda c: forget_stories(c, before))

    async def forget_dataset(self, name: str) -> None:
        """It was removed: what had been asked of it says nothing about the next of that name."""
        for row in await self._store.run(lambda c: forget_dataset(c, name)):
            self._files.request(row.id).unlink(missing_ok=True)


def forget(connection: sqlite3.Connection, before: float, datasets: Path) -> list[Row]:
    """Remove requests that ended before that time, some at once, and their stories; the rows as they were.

    The newest request of a dataset that is still there stays: it says whose dataset that is.
    """
    names = connection.execute(f"SELECT DISTINCT dataset FROM requests WHERE {_OLD} AND dataset <> ''", (before,))  # noqa: S608 - constants
    there = [name for (name,) in names if dataset_folder(datasets, name).exists()]
    newest = "SELECT max(sequence) FROM requests WHERE dataset IN (SELECT value FROM json_each(?)) GROUP BY dataset"
    rows = table.select(
        connection,
        f"{_OLD} AND sequence NOT IN ({newest})",
        before,
        msgspec.json.encode(there).decode(),
        tail=f"ORDER BY ended LIMIT {_AT_ONCE}",
    )
    connection.executemany("DELETE FROM events WHERE subject = ?", [(f"request:{row.id}",) for row in rows])
    connection.executemany("DELETE FROM results WHERE sequence = ?", [(row.sequence,) for row in rows])
    connection.executemany("DELETE FROM requests WHERE sequence = ?", [(row.sequence,) for row in rows])
    return rows


def forget_dataset(connection: sqlite3.Connection, name: str) -> list[Row]:
    """It is not there any more: its requests say nothing about the next of that name; these, as they are now."""
    rows = table.select(connection, "dataset = ?", name)
    return [table.update(connection, row, dataset="") for row in rows]


def forget_stories(connection: sqlite3.Connection, before: float) -> None:
    """Remove what happened before that time to pools that are no more; of those that are, `story` keeps the latest."""
    connection.execute(
        """DELETE FROM events WHERE subject >= 'pool:' AND subject < 'pool;' AND time < ?
            AND substr(subject, 6) NOT IN (SELECT name FROM pools)""",
        (before,),
    )
