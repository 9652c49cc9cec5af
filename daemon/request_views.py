"""What people see of requests: their state, what they wait for, what they have said, and how it came to that."""

from __future__ import annotations

import asyncio
from collections import ChainMap
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from nnsight_hpc.daemon import request_log, small, table
from nnsight_hpc.daemon.backlog import HELD
from nnsight_hpc.daemon.records import SPARE
from nnsight_hpc.daemon.words import duration
from nnsight_hpc.wire.files import read_if_there
from nnsight_hpc.wire.messages import RequestLog, RequestStatus, Story
from nnsight_hpc.wire.states import RequestState

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Collection, Mapping, Sequence

    from nnsight_hpc.daemon.changes import Changes
    from nnsight_hpc.daemon.pools import Pools
    from nnsight_hpc.daemon.requests import Requests
    from nnsight_hpc.daemon.scheduler import Pace
    from nnsight_hpc.daemon.store import Store
    from nnsight_hpc.daemon.story import Stories
    from nnsight_hpc.daemon.table import Row

_Q = RequestState
SMALL_RESULT = 1 << 20
"""Bytes of a result that comes with the news of its end; a larger one is streamed from its file when it is asked for."""


class _Outlook(NamedTuple):
    """The seconds that a request can be given by a replica that serves; where none does, what its pool waits for."""

    most: float | None = None
    note: str = ""


class _Queued(NamedTuple):
    """What is known of all that wait for a pool."""

    outlook: _Outlook
    pace: Pace
    positions: Mapping[str, int]


class RequestViews:
    """Reads what `Requests` writes."""

    def __init__(self, store: Store, changes: Changes, pools: Pools, requests: Requests, stories: Stories) -> None:
        self._store, self._changes, self._pools, self._stories = store, changes, pools, stories
        self._dumps, self._files, self._scheduler = requests.dumps, requests.files, requests.scheduler

    async def find(self, request: str) -> Row | None:
        return await self._store.run(lambda c: table.find(c, request))

    async def peek(self, request: str) -> Row | None:
        """As `find`, where what is found is not told: it may not be on disk yet, and nobody waits for that."""
        return await self._store.start(lambda c: table.find(c, request)).done

    async def row(self, request: str) -> Row:
        return await self._store.run(lambda c: table.get(c, request))

    async def status(self, request: str) -> RequestStatus:
        return self.status_of(await self.row(request))

    async def wait(self, request: str, seen: str, seconds: float) -> RequestStatus:
        """The status as soon as its state is not `seen`, or after `seconds`."""
        return await self._changes.wait(
            f"request:{request}",
            lambda: self.status(request),
            lambda status: status.state.ended or status.state != seen,
            seconds,
        )

    async def log(self, request: str, start: int, seen: str, seconds: float) -> RequestLog:
        """What it has said from byte `start` on: as soon as there is any or its state is not `seen`, or after `seconds`."""

        async def read() -> RequestLog:
            row = await self.row(request)
            return await asyncio.to_thread(self._log, row, self.status_of(row), start)

        def enough(log: RequestLog) -> bool:
            return bool(log.lines) or log.complete or log.status.state != seen

        return await self._changes.wait(f"request:{request}", read, enough, seconds)

    def news(self, request: str) -> asyncio.Event:
        """Set as soon as it says something, or has ended; asked for before it is there, it misses nothing."""
        return self._changes.event(f"news:{request}")

    async def answer(self, request: str) -> tuple[RequestLog, bytes]:
        """What it has said so far; with its result where it has completed, all is said, and it is small."""
        row, kept = await self._store.run(lambda c: _with_result(c, request))
        status = self.status_of(row)

        def read() -> tuple[RequestLog, bytes]:
            log = self._log(row, status, 0)
            is_small = row.state == _Q.COMPLETED and log.complete and row.result_bytes <= SMALL_RESULT
            result = (kept or read_if_there(self._files.result(row.id, row.attempt))) if is_small else None
            return log, result if result and len(result) == row.result_bytes else b""

        return await asyncio.to_thread(read)

    def fresh_log(self, row: Row) -> RequestLog:
        """All that a request has said which has ended without a word."""
        return RequestLog(status=self.status_of(row), complete=True)

    def _log(self, row: Row, status: RequestStatus, start: int) -> RequestLog:
        """Reads files."""
        files = [self._files.log(row.id, attempt) for attempt in range(1, row.attempt + 1)]
        lines, end, is_all = request_log.read(files, start)
        return RequestLog(status=status, lines=lines, next=end, complete=row.state.ended and is_all)

    async def overview(self, user: str | None, limit: int) -> list[RequestStatus]:
        """What workers have, what goes next, and what has ended last: so many of each, of one user or of all (None).

        In the order of their coming.
        """
        coming = self._scheduler.coming(user, limit)

        def read(connection: sqlite3.Connection) -> dict[str, Row]:
            held, ended = (table.page(connection, states, user, limit) for states in (HELD, table.ENDED))
            return {row.id: row for row in (*held, *table.of_ids(connection, coming), *ended)}

        rows = await self._store.run(read)
        return self._statuses(sorted(rows.values(), key=lambda row: row.sequence), coming)

    async def page(
        self, states: Collection[RequestState], user: str | None, limit: int, before: str
    ) -> list[RequestStatus]:
        """The latest in one of these states, of those that came before the request `before`, if that is given.

        Raises `NotFound` where there is no such request.
        """

        def read(connection: sqlite3.Connection) -> list[Row]:
            newest = {"before": table.get(connection, before).sequence} if before else {}
            return table.page(connection, states, user, limit, **newest)

        rows = await self._store.run(read)
        waiting = {row.id: row.pool for row in rows if row.state == _Q.QUEUED}
        places = ChainMap(*(self._scheduler.positions(pool, waiting) for pool in {*waiting.values()}))
        return self._statuses(rows, places)

    async def story(self, request: str) -> Story:
        """All that happened to it."""
        status = await self.status(request)
        return Story(now=_now(status), events=tuple(await self._stories.of(f"request:{request}")))

    async def dataset(self, name: str) -> Row | None:
        """The newest request that was to write the dataset."""
        return await self._store.run(lambda c: table.of_dataset(c, name))

    async def datasets(self) -> dict[str, Row]:
        """The newest request of each dataset."""
        return {row.dataset: row for row in await self._store.run(table.newest_of_datasets)}

    def _statuses(self, rows: Sequence[Row], positions: Mapping[str, int]) -> list[RequestStatus]:
        """`positions` are those of the requests that wait."""
        pools = {row.pool for row in rows if row.state == _Q.QUEUED}
        queues = {pool: _Queued(self._outlook(pool), self._scheduler.pace(pool), positions) for pool in pools}
        return [self.status_of(row, queues.get(row.pool)) for row in rows]

    def status_of(self, row: Row, queued: _Queued | None = None) -> RequestStatus:
        """A row that was just read, as people see it.

        `queued` is what is known of what waits for its pool, where that was asked already.
        """
        status = RequestStatus(
            id=row.id,
            kind=row.kind,
            pool=row.pool,
            state=row.state,
            user=row.user,
            times=row.times,
            error=row.error,
            result_bytes=row.result_bytes,
            progress=self._dumps.progress(row.id) or row.progress,
            note=row.note,
            needs=row.needs,
            paused=row.paused and not row.state.ended,
        )
        if row.state != _Q.QUEUED:
            return status
        if row.paused:
            return msgspec.structs.replace(status, waits_for=f"its user: `nnsight-hpc dump resume {row.dataset}`")
        outlook = queued.outlook if queued else self._outlook(row.pool)
        position = queued.positions.get(row.id) if queued else self._scheduler.position(row.pool, row.id)
        pace = queued.pace if queued else self._scheduler.pace(row.pool)
        starts = None if position is None else pace.starts(position)
        waits_for = _waits_for(row.needs, outlook)
        return msgspec.structs.replace(status, position=position, starts=starts, waits_for=waits_for)

    def _outlook(self, pool: str) -> _Outlook:
        serving = [replica.id for replica in self._pools.replicas(pool) if replica.serves]
        if serving:
            return _Outlook(most=max(map(self._pools.left, serving)) - SPARE)
        return _Outlook(note=self._pools.note(pool) if self._pools.find(pool) else "")


def _with_result(connection: sqlite3.Connection, request: str) -> tuple[Row, bytes]:
    """A request, and its result where it is kept with its row."""
    row = table.get(connection, request)
    return row, small.result(connection, row)


def _waits_for(needs: float, outlook: _Outlook) -> str:
    """What a queued request waits for beside its turn; nothing where a replica serves that can see its end."""
    if outlook.most is None:
        return outlook.note
    if needs <= outlook.most:
        return ""
    most = duration(outlook.most)
    return f"a replica with more time left: it needs {duration(needs)}, those that serve can give {most}"


def _now(status: RequestStatus) -> str:
    """How a request stands, in one sentence."""
    if status.error is not None:
        return f"it has failed: {status.error.what}"
    if status.state != _Q.QUEUED:
        return f"it is {status.state}"
    before = f"; {status.position} are before it" if status.position else ""
    return f"it waits for {status.waits_for or 'its turn'}{before}"
