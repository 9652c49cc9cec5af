"""The daemon's SQLite file, owned by one thread: the event loop never waits for a disk, and nothing else ever locks.

Each epoch has a file of its own. The next daemon copies the newest, with its journal when its owner was killed in the
middle of a commit, under a name that nobody takes for a database until the copy is whole. Changes that wait at the same
time are committed together, so a busy daemon pays one fsync for many.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import re
import shutil
import sqlite3
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from nnsight_hpc.wire.errors import CorruptData, HpcError, Incompatible
from nnsight_hpc.wire.files import sync_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from nnsight_hpc.wire.places import Places

logger = logging.getLogger(__name__)

T = TypeVar("T")

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE requests (
            sequence INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, pool TEXT NOT NULL,
            state TEXT NOT NULL, user TEXT NOT NULL, times TEXT NOT NULL, fingerprint TEXT NOT NULL,
            dataset TEXT NOT NULL, dump BLOB NOT NULL, attempt INTEGER NOT NULL DEFAULT 0,
            replica TEXT NOT NULL DEFAULT '', cancel INTEGER NOT NULL DEFAULT 0, error BLOB NOT NULL DEFAULT X'',
            result_bytes INTEGER NOT NULL DEFAULT 0, progress BLOB NOT NULL DEFAULT X'',
            note TEXT NOT NULL DEFAULT '')""",
        "CREATE INDEX requests_of_pool ON requests (state, pool, sequence)",
        "CREATE INDEX requests_of_dataset ON requests (dataset, sequence) WHERE dataset <> ''",
        "CREATE TABLE pools (name TEXT PRIMARY KEY, body BLOB NOT NULL)",
        "CREATE TABLE replicas (id TEXT PRIMARY KEY, body BLOB NOT NULL)",
    ),
)
"""The statements that lead from each version of the schema to the next; SQLite's ``user_version`` counts them."""

_DATABASE = re.compile(r"daemon-(\d+)\.sqlite")
_KEPT = 2
"""Databases of so many earlier epochs stay, for a person who needs to look."""


class _Work(Generic[T]):
    def __init__(self, function: Callable[[sqlite3.Connection], T], future: asyncio.Future[T]) -> None:
        self._function, self._future = function, future
        self._result: T | None = None
        self._error: BaseException | None = None

    def attempt(self, connection: sqlite3.Connection) -> None:
        """Run within the open transaction; undo what it did when it raises."""
        connection.execute("SAVEPOINT work")
        try:
            self._result = self._function(connection)
        except Exception as error:  # noqa: BLE001 - handed to whoever asked
            self._error = error
            connection.execute("ROLLBACK TO work")
        connection.execute("RELEASE work")

    def fail(self, error: BaseException) -> None:
        self._error = error

    def deliver(self) -> None:
        if self._future.done():  # whoever asked has left
            return
        if self._error is not None:
            self._future.set_exception(self._error)
        else:
            self._future.set_result(self._result)  # type: ignore[arg-type]  # attempt() has set it


class Store:
    """A database in a thread.

    Parameters
    ----------
    check
        Called after each commit, before anybody learns of it; raises when this daemon may have lost its lease by then,
        so that nothing is acknowledged which the next daemon did not copy.
    """

    def __init__(self, path: Path, check: Callable[[], None]) -> None:
        self._path, self._check = path, check
        self._queue: queue.SimpleQueue[_Work[Any] | None] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._serve, name="store")
        self._thread.start()

    async def run(self, function: Callable[[sqlite3.Connection], T]) -> T:
        """The result of `function`, run in a transaction of its own that is on disk when this returns."""
        future: asyncio.Future[T] = self._loop.create_future()
        self._queue.put(_Work(function, future))
        return await future

    async def close(self) -> None:
        """Finish what was handed over, and end the thread."""
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)

    def _serve(self) -> None:
        connection = connect(self._path)
        running = True
        while running:
            batch = self._take()
            running = None not in batch
            works = [work for work in batch if work is not None]
            self._commit(connection, works)
            self._loop.call_soon_threadsafe(_deliver, works)
        connection.close()

    def _take(self) -> list[_Work[Any] | None]:
        batch = [self._queue.get()]
        with suppress(queue.Empty):
            while True:
                batch.append(self._queue.get_nowait())
        return batch

    def _commit(self, connection: sqlite3.Connection, works: Sequence[_Work[Any]]) -> None:
        try:
            connection.execute("BEGIN")
            for work in works:
                work.attempt(connection)
            connection.execute("COMMIT")
            self._check()
        except Exception as error:  # noqa: BLE001 - handed to everybody who waits
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            reason = self._unwritable(error) if isinstance(error, sqlite3.Error) else error
            for work in works:
                work.fail(reason)

    def _unwritable(self, error: sqlite3.Error) -> HpcError:
        logger.error("cannot write %s: %s", self._path, error)
        return HpcError(
            "the daemon cannot write its database",
            where=str(self._path),
            why=str(error),
            next="look whether the file system is full or over your quota, and try again",
        )


def _deliver(works: Sequence[_Work[Any]]) -> None:
    for work in works:
        work.deliver()


def connect(path: Path) -> sqlite3.Connection:
    """Open a database for this process alone, in rollback-journal mode, each commit on disk before it returns."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=256)
    connection.row_factory = sqlite3.Row
    for pragma in ("locking_mode = EXCLUSIVE", "journal_mode = TRUNCATE", "synchronous = FULL"):
        connection.execute(f"PRAGMA {pragma}")
    return connection


def take_over(places: Places, epoch: int) -> Path:
    """Make the database of `epoch` from the newest earlier one, or an empty one; the file is complete or not there.

    Raises `Incompatible` when a newer version of this program wrote it, `CorruptData` when SQLite finds it damaged.
    """
    copy = places.home / f"daemon-{epoch}.copy"
    journal = _journal(copy)
    for left_over in (copy, journal):
        left_over.unlink(missing_ok=True)
    earlier = _databases(places.home)
    if earlier:
        source = places.database(earlier[-1])
        if _journal(source).exists():
            shutil.copyfile(_journal(source), journal)
        shutil.copyfile(source, copy)
    _migrate(copy)
    journal.unlink(missing_ok=True)  # its work is done, and the copy gets another name
    copy.chmod(0o600)
    copy.replace(places.database(epoch))
    sync_folder(places.home)
    for old in earlier[:-_KEPT]:
        _journal(places.database(old)).unlink(missing_ok=True)
        places.database(old).unlink(missing_ok=True)
    return places.database(epoch)


def _migrate(path: Path) -> None:
    """Roll back an unfinished commit, check the file, and bring its schema up to date."""
    try:
        connection = connect(path)
        if (found := connection.execute("PRAGMA quick_check").fetchone()[0]) != "ok":
            raise CorruptData("the daemon's database is damaged", where=str(path), why=found)
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version > len(MIGRATIONS):
            raise Incompatible(
                "a newer version of nnsight-hpc wrote the daemon's database",
                where=str(path),
                why=f"its schema has version {version}, this program knows {len(MIGRATIONS)}",
                next="use the newer version",
            )
        connection.execute("BEGIN")
        for statement in (statement for migration in MIGRATIONS[version:] for statement in migration):
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        connection.execute("COMMIT")
        connection.close()
    except sqlite3.DatabaseError as error:
        raise CorruptData("the daemon's database cannot be read", where=str(path), why=str(error)) from None


def _journal(database: Path) -> Path:
    return database.with_name(f"{database.name}-journal")


def _databases(home: Path) -> list[int]:
    return sorted(int(found[1]) for path in home.iterdir() if (found := _DATABASE.fullmatch(path.name)))
