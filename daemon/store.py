"""The daemon's database, owned by one thread: the event loop never waits for a disk, and nothing else ever locks.

Changes that wait at the same time are committed together, so a busy daemon pays one fsync for many; a change for whose
commit nobody waits (`Store.start`) is committed with one for which somebody does, or a moment later.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import sqlite3
import threading
import time
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from nnsight_hpc.daemon.database import connect, unwritable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

logger = logging.getLogger(__name__)

T = TypeVar("T")

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
                reason = unwritable(self._path, error) if isinstance(error, sqlite3.Error) else error
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
