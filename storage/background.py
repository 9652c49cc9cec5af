"""One thread that does jobs in order, with a bound on the bytes that wait for it."""

from __future__ import annotations

from collections import deque
from threading import Condition, Thread
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class BackgroundThread:
    """Runs jobs one after another, and holds at most `limit` bytes of them; a full queue blocks the producer.

    A job that is larger than `limit` waits until it is alone. After a job has raised, the ones behind it are dropped and
    the next `submit` or `finish` raises its exception. `name` is what debuggers call the thread.
    """

    def __init__(self, limit: int, name: str) -> None:
        self._limit = limit
        self._jobs: deque[tuple[Callable[[], None], int]] = deque()
        self._held = 0
        self._closed = False
        self._error: BaseException | None = None
        self._changed = Condition()
        self._thread = Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], None], size: int) -> None:
        """Queue a job that holds `size` bytes, when there is room for it."""
        with self._changed:
            self._changed.wait_for(lambda: self._error or not self._held or self._held + size <= self._limit)
            self._raise_error()
            self._jobs.append((job, size))
            self._held += size
            self._changed.notify_all()

    def finish(self) -> None:
        """Wait for all jobs and end the thread."""
        self._close()
        self._thread.join()
        self._raise_error()

    def abandon(self) -> None:
        """Drop the jobs that wait, let the running one end, and end the thread."""
        with self._changed:
            self._jobs.clear()
        self._close()
        self._thread.join()

    def _close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (item := self._next()) is not None:
            job, size = item
            try:
                job()
            except BaseException as error:  # noqa: BLE001  (it is raised in the producer's thread)
                self._fail(error)
            del job, item  # the bytes are free before the room for them is announced
            with self._changed:
                self._held -= size
                self._changed.notify_all()

    def _next(self) -> tuple[Callable[[], None], int] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closed)
            return self._jobs.popleft() if self._jobs else None

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = error
            self._held -= sum(size for _, size in self._jobs)
            self._jobs.clear()
            self._changed.notify_all()
