"""The daemon's SQLite file, owned by one thread: the event loop never waits for a disk, and nothing else ever locks.

Each epoch has a file of its own. The next daemon copies the newest, with its journal when its owner was killed in the
middle of a commit, under a name that nobody takes for a database until the copy is whole. Changes that wait at the same
time are committed together, so a busy daemon pays one fsync for many; a change for whose commit nobody waits (`Store.start`)
is committed with one for which somebody does, or a moment later.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import re
import shutil
import sqlite3
import threading
import time
from contextlib import closing
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from nnsight_hpc.wire.errors import CorruptData, HpcError, Incompatible
from nnsight_hpc.wire.files import sync_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from nnsight_hpc.wire.places import Places

logger = logging.getLogger(__name__)

T = TypeVar("T")

_TP_FOR_TASKS_PER_NODE = """UPDATE {table} SET body = CAST(json_remove(json_set(CAST(body AS TEXT), '$.spec.tp',
    json_extract(CAST(body AS TEXT), '$.spec.nodes') * json_extract(CAST(body AS TEXT), '$.spec.tasks_per_node')),
    '$.spec.tasks_per_node') AS BLOB)"""
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
    tuple(_TP_FOR_TASKS_PER_NODE.format(table=table) for table in ("pools", "replicas")),
    (
        "ALTER TABLE requests ADD COLUMN needs REAL NOT NULL DEFAULT 0",
        "ALTER TABLE requests ADD COLUMN kills INTEGER NOT NULL DEFAULT 0",
        """CREATE TABLE events (sequence INTEGER PRIMARY KEY, subject TEXT NOT NULL, time REAL NOT NULL, text TEXT NOT NULL,
            replica TEXT NOT NULL)""",
        "CREATE INDEX events_of_subject ON events (subject, sequence)",
        """UPDATE pools SET body = CAST(json_set(CAST(body AS TEXT), '$.down', json('true')) AS BLOB)
            WHERE json_extract(CAST(body AS TEXT), '$.desired') = 0""",
        "UPDATE replicas SET body = CAST(json_remove(CAST(body AS TEXT), '$.cause') AS BLOB)",  # words; now an EndCause
    ),
    (
        "ALTER TABLE requests ADD COLUMN priority INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE requests ADD COLUMN batch TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE requests ADD COLUMN tokens INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE requests ADD COLUMN gave_way INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE requests ADD COLUMN digest TEXT NOT NULL DEFAULT ''",
        "CREATE INDEX requests_of_user ON requests (user, state)",
        "CREATE TABLE usage (user TEXT PRIMARY KEY, seconds REAL NOT NULL, time REAL NOT NULL)",
    ),
    (
        "ALTER TABLE requests ADD COLUMN ended REAL NOT NULL DEFAULT 0",
        """UPDATE requests SET ended = coalesce(json_extract(times, '$.' || state), 0)
            WHERE state IN ('COMPLETED', 'FAILED', 'CANCELLED', 'EXPIRED')""",
        "CREATE INDEX requests_by_end ON requests (ended) WHERE ended > 0",
        "DROP INDEX requests_of_pool",
        "CREATE INDEX requests_of_state ON requests (state)",  # SQLite adds the sequence to each
    ),
    (
        "CREATE TABLE bodies (sequence INTEGER PRIMARY KEY, frame BLOB NOT NULL)",
        "CREATE TABLE results (sequence INTEGER PRIMARY KEY, frame BLOB NOT NULL)",
    ),
    ("ALTER TABLE requests ADD COLUMN paused INTEGER NOT NULL DEFAULT 0",),
)
"""The statements that lead from each version of the schema to the next; SQLite's ``user_version`` counts them."""

_DATABASE = re.compile(r"daemon-(\d+)\.sqlite")
_KEPT = 2
"""Databases of so many earlier epochs stay, for a person who needs to look."""


_MOMENT = 0.05
"""Seconds for which a change may wait to be committed where nobody waits for that."""


class Work(Generic[T]):
    """A change that was handed over.

    Attributes
    ----------
    done
        Its result, once it has run; it is not on disk yet, and may never be. Known of those that are `early`.
    durable
        Its result, once it is on disk, or why it is not.
    """

    def __init__(
        self, function: Callable[[sqlite3.Connection], T], loop: asyncio.AbstractEventLoop, *, early: bool, waits: bool
    ) -> None:
        self._function, self.early, self.waits = function, early, waits
        self.done: asyncio.Future[T] = loop.create_future()
        self.durable: asyncio.Future[T] = loop.create_future()
        self._result: T | None = None
        self._error: BaseException | None = None
        for future in (self.done, self.durable):
            future.add_done_callback(_look_at)  # whoever asked may have left

    def attempt(self, connection: sqlite3.Connection) -> None:
        """Run within the open transaction; undo what it did when it raises. Where SQLite cannot go on, that is raised."""
        connection.execute("SAVEPOINT work")
        try:
            self._result = self._function(connection)
        except sqlite3.OperationalError:  # a full disk, say: all of the transaction may be undone already
            raise
        except Exception as error:  # noqa: BLE001 - handed to whoever asked
            self._error = error
            connection.execute("ROLLBACK TO work")
        connection.execute("RELEASE work")

    def fail(self, error: BaseException) -> None:
        self._error = error

    def tell_done(self) -> None:
        self._tell(self.done)

    def tell_durable(self) -> None:
        self._tell(self.done)  # where it could not be run
        self._tell(self.durable)

    def _tell(self, future: asyncio.Future[T]) -> None:
        if future.done():
            return
        if self._error is not None:
            future.set_exception(self._error)
        else:
            future.set_result(self._result)  # type: ignore[arg-type]  # attempt() has set it


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
        self._queue: queue.SimpleQueue[Work[Any] | None] = queue.SimpleQueue()
        self._loop, self._closed = asyncio.get_running_loop(), False
        self._thread = threading.Thread(target=self._serve, name="store")
        self._thread.start()

    async def run(self, function: Callable[[sqlite3.Connection], T]) -> T:
        """The result of `function`, run in a transaction that is on disk when this returns, with all that ran before it."""
        return await self._hand_over(function).durable

    def start(self, function: Callable[[sqlite3.Connection], T], *, waits: bool = False) -> Work[T]:
        """Have `function` run after all that was handed over before; nobody may be told of what it did until it is durable.

        Parameters
        ----------
        waits
            Whether somebody waits until it is on disk; otherwise it may take a moment longer.
        """
        return self._hand_over(function, early=True, waits=waits)

    def post(self, function: Callable[[sqlite3.Connection], object]) -> None:
        """Have `function` run as `run` does, after all that was handed over before; an error is logged."""
        self._hand_over(function).durable.add_done_callback(_log_failure)

    async def close(self) -> None:
        """Finish what was handed over, and end the thread."""
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)

    def _hand_over(
        self, function: Callable[[sqlite3.Connection], T], *, early: bool = False, waits: bool = True
    ) -> Work[T]:
        work = Work(function, self._loop, early=early, waits=waits)
        self._queue.put(work)
        return work

    def _serve(self) -> None:
        connection = connect(self._path)
        while not self._closed:
            works: list[Work[Any]] = []
            try:
                self._transact(connection, works)
                self._check()
            except Exception as error:  # noqa: BLE001 - handed to everybody who waits
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                reason = _unwritable(self._path, error) if isinstance(error, sqlite3.Error) else error
                for work in works:
                    work.fail(reason)
            self._loop.call_soon_threadsafe(_tell_durable, works)
        connection.close()

    def _transact(self, connection: sqlite3.Connection, works: list[Work[Any]]) -> None:
        """Run what comes until somebody waits for the disk, or the first has waited for a moment, and commit it.

        What was taken is added to `works`.
        """
        due, waits = float("inf"), False
        while not (waits or self._closed) and (batch := self._take(due)):
            self._closed = None in batch
            taken = [work for work in batch if work is not None]
            works += taken
            if not connection.in_transaction:
                connection.execute("BEGIN")
                due = time.monotonic() + _MOMENT
            for work in taken:
                work.attempt(connection)
            waits = any(work.waits for work in taken)
            if early := [work for work in taken if work.early]:
                self._loop.call_soon_threadsafe(_tell_done, early)
        connection.execute("COMMIT")

    def _take(self, due: float) -> list[Work[Any] | None]:
        """All that has come, once there is any; nothing where none comes until `due`."""
        batch: list[Work[Any] | None] = []
        try:
            batch.append(self._queue.get(timeout=None if due == float("inf") else max(0.0, due - time.monotonic())))
            while True:
                batch.append(self._queue.get_nowait())
        except queue.Empty:
            return batch


def _look_at(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()


def _log_failure(future: asyncio.Future[object]) -> None:
    if not future.cancelled() and (error := future.exception()):
        logger.warning("could not be written down: %s", error)


def _tell_done(works: Sequence[Work[Any]]) -> None:
    for work in works:
        work.tell_done()


def _tell_durable(works: Sequence[Work[Any]]) -> None:
    for work in works:
        work.tell_durable()


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
    _remove(copy)
    earlier = [places.database(epoch) for epoch in _databases(places.home)]
    try:
        if earlier:
            if _journal(earlier[-1]).exists():
                shutil.copyfile(_journal(earlier[-1]), journal)
            shutil.copyfile(earlier[-1], copy)
        _migrate(copy)
    except BaseException as error:
        _remove(copy)
        if isinstance(error, sqlite3.OperationalError):
            raise _unwritable(copy, error) from None
        if isinstance(error, sqlite3.DatabaseError):
            raise _damaged(earlier, str(error)) from None
        raise
    journal.unlink(missing_ok=True)  # its work is done, and the copy gets another name
    copy.chmod(0o600)
    copy.replace(places.database(epoch))
    sync_folder(places.home)
    for old in earlier[:-_KEPT]:
        _remove(old)
    return places.database(epoch)


def _migrate(path: Path) -> None:
    """Roll back an unfinished commit, check the file, and bring its schema up to date."""
    with closing(connect(path)) as connection:
        if (found := connection.execute("PRAGMA quick_check").fetchone()[0]) != "ok":
            raise sqlite3.DatabaseError(found)
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


def _damaged(databases: Sequence[Path], why: str) -> CorruptData:
    """The newest of these cannot be read: what its owner can do, with the one before it or without one."""
    *_, newest = databases
    aside = f"mv {newest} {newest}.damaged"
    if len(databases) > 1:
        advice = (
            f"go back to the one before it: {aside} && cp {databases[-2]} {newest}; what was asked since is forgotten"
        )
    else:
        advice = f"begin with an empty queue: {aside}; `nnsight-hpc gc` then finds jobs that nobody knows"
    return CorruptData("the daemon's database is damaged", where=str(newest), why=why, next=advice)


def _unwritable(path: Path, error: sqlite3.Error) -> HpcError:
    logger.error("cannot write %s: %s", path, error)
    return HpcError(
        "the daemon cannot write its database",
        where=str(path),
        why=str(error),
        next="look whether the file system is full, over your quota or read-only, and try again",
    )


def _remove(database: Path) -> None:
    _journal(database).unlink(missing_ok=True)
    database.unlink(missing_ok=True)


def _journal(database: Path) -> Path:
    return database.with_name(f"{database.name}-journal")


def _databases(home: Path) -> list[int]:
    return sorted(int(found[1]) for path in home.iterdir() if (found := _DATABASE.fullmatch(path.name)))
