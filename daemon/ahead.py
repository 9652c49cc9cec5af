"""Changes of requests that memory follows before they are on the disk, and how it goes back where they do not come there."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

from nnsight_hpc.daemon import table
from nnsight_hpc.wire.errors import HpcError

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable

    from nnsight_hpc.daemon.store import Store, Work
    from nnsight_hpc.daemon.table import Row

T = TypeVar("T")

_AGAIN = 1.0
"""Seconds until the database is asked again after it could not be written."""


class Ahead:
    """Hands changes over that nobody waits for.

    Parameters
    ----------
    back
        Takes a request whose change was lost, and its row as it is on the disk, if there is one.
    """

    def __init__(self, store: Store, back: Callable[[str, Row | None], None]) -> None:
        self._store, self._back = store, back
        self._going: set[asyncio.Task[None]] = set()

    def start(
        self, function: Callable[[sqlite3.Connection], T], requests: list[str], *, waits: bool = False
    ) -> Work[T]:
        """As `Store.start`, of a change of these requests."""
        work = self._store.start(function, waits=waits)

        def look(durable: asyncio.Future[T]) -> None:
            if work.done.cancelled() or durable.cancelled():  # the daemon stops
                return
            if work.done.exception() is None and durable.exception() is not None:
                task = asyncio.ensure_future(self._go_back(requests))
                self._going.add(task)
                task.add_done_callback(self._going.discard)

        work.durable.add_done_callback(look)
        return work

    async def _go_back(self, requests: list[str]) -> None:
        for name, row in (await self._there(requests)).items():
            self._back(name, row)

    async def _there(self, requests: list[str]) -> dict[str, Row | None]:
        """The rows of these as they are on disk, as soon as that can be said."""
        while True:
            try:
                return await self._store.run(lambda c: {name: table.find(c, name) for name in requests})
            except HpcError:
                await asyncio.sleep(_AGAIN)
