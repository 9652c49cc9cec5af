"""That requests run: as their workers say, or as it follows from what the requests say."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from nnsight_hpc.daemon import attempts, request_log
from nnsight_hpc.wire.workers import Begun

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Collection, Iterable

    from nnsight_hpc.daemon.changes import Changes
    from nnsight_hpc.daemon.memory import Memory
    from nnsight_hpc.daemon.request_files import RequestFiles
    from nnsight_hpc.daemon.store import Store
    from nnsight_hpc.daemon.table import Row

_MOMENT = 0.1
"""Seconds after which it is written down that a request runs; most have ended by then, and it would delay that."""


class Starts:
    """Writes down what runs for more than a moment, or says something."""

    def __init__(self, store: Store, changes: Changes, memory: Memory, files: RequestFiles) -> None:
        self._store, self._changes, self._memory, self._files = store, changes, memory, files
        self._just_begun: dict[str, Begun] = {}

    async def started(self, replica: str, begun: Collection[Begun]) -> None:
        """These run now, as far as the replica holds them; it is written down of those that run for more than a moment."""
        self._just_begun |= {one.id: one for one in begun}
        await asyncio.sleep(_MOMENT)
        still = self.unwritten(one.id for one in begun)
        self._run(replica, await self._store.run(lambda c: attempts.begin(c, still, replica)) if still else [])

    def unwritten(self, requests: Iterable[str]) -> list[Begun]:
        """Those of them of which it is to be written down still that they have begun; from now on it is not."""
        return [begun for one in requests if (begun := self._just_begun.pop(one, None))]

    async def said(self, request: str, replica: str, attempt: int, at: int, lines: bytes) -> None:
        """Keep what a running request has said, at its place in the attempt's log. Who hears it finds that it runs."""

        def begin(connection: sqlite3.Connection) -> list[Row]:
            attempts.held_by(connection, request, replica, attempt)
            return attempts.begin(connection, [Begun(id=request, attempt=attempt)], replica)

        self._run(replica, await self._store.run(begin))
        if held := self._memory.holdings.named(request, replica):
            held.quiet = False
        await asyncio.to_thread(request_log.write, self._files.log(request, attempt), at, lines)
        self._changes.announce(f"request:{request}")
        self._changes.announce(f"news:{request}")

    def _run(self, replica: str, rows: Iterable[Row]) -> None:
        """It is on disk that these run now."""
        for row in rows:
            if held := self._memory.holdings.named(row.id, replica):
                held.begin(row)
            self._memory.moved(row)
