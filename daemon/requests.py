"""The queue: what is asked of the pools, from the moment it is stored until it has ended.

SQLite is the truth, and every change of state goes through `wire.states.move` in one transaction. What is kept beside
it in memory, `_held`, is only what workers tell us every few seconds: who still runs what, and how far a dump is.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import TYPE_CHECKING

import msgspec

from nnsight_hpc.daemon import request_log, table
from nnsight_hpc.daemon.refusals import check_dataset_is_free, fingerprint_error
from nnsight_hpc.storage import dataset_folder
from nnsight_hpc.wire.errors import Conflict, HpcError, ReplicaFailed
from nnsight_hpc.wire.messages import DumpProgress, DumpSpec, Lease, RequestLog, RequestStatus
from nnsight_hpc.wire.states import RequestState

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from nnsight_hpc.daemon.changes import Changes
    from nnsight_hpc.daemon.config import Config
    from nnsight_hpc.daemon.pools import Pools
    from nnsight_hpc.daemon.store import Store
    from nnsight_hpc.daemon.table import Row
    from nnsight_hpc.wire.messages import ModelIdentity, Outcome

_Q = RequestState
_HELD = (_Q.LEASED, _Q.RUNNING)


class NewRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request whose bytes are on disk. `fingerprint` is that of the model its graph was made for, where given."""

    id: str
    kind: str
    pool: str
    user: str
    received: float
    fingerprint: str = ""
    dump: DumpSpec | None = None


class _Held:
    """What is known in memory of a leased request: when its worker last named it, and the orders that wait for it."""

    def __init__(self, row: Row) -> None:
        self.replica, self.attempt, self.cancel = row.replica, row.attempt, row.cancel
        self.seen = time.monotonic()
        self.progress: DumpProgress | None = None


class Requests:
    """The requests of all pools."""

    def __init__(self, store: Store, changes: Changes, pools: Pools, config: Config) -> None:
        self._store, self._changes, self._pools, self._config = store, changes, pools, config
        self._held: dict[str, _Held] = {}

    async def load(self) -> None:
        """After a start: give the workers time to say what they still hold, and end what was ending. Load pools first."""
        rows = await self._store.run(lambda c: table.select(c, "state IN ('LEASED', 'RUNNING')"))
        self._held = {row.id: _Held(row) for row in rows}
        await self._fail_hopeless(await self.queued())
        await asyncio.to_thread(self._remove_unknown_files, await self._store.run(table.ids))

    def _remove_unknown_files(self, known: set[str]) -> None:
        """Requests that were never acknowledged; a result may just be being written, by a worker that outlived us."""
        for path in self._config.places.requests.iterdir():
            request, _, rest = path.name.partition(".")
            if request not in known or (rest.startswith("request.") and rest.endswith(".partial")):
                path.unlink(missing_ok=True)

    # -- for people ----------------------------------------------------------------------------------------------

    def request_file(self, request: str) -> Path:
        return self._config.places.requests / f"{request}.request"

    def result_file(self, request: str, attempt: int) -> Path:
        return self._config.places.requests / f"{request}.{attempt}.result"

    def log_file(self, request: str, attempt: int) -> Path:
        return self._config.places.requests / f"{request}.{attempt}.log"

    async def find(self, request: str) -> Row | None:
        return await self._store.run(lambda c: table.find(c, request))

    async def row(self, request: str) -> Row:
        return await self._store.run(lambda c: table.get(c, request))

    async def status(self, request: str) -> RequestStatus:
        return self._status(*await self._store.run(lambda c: table.with_position(c, table.get(c, request))))

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
            row, position = await self._store.run(lambda c: table.with_position(c, table.get(c, request)))
            files = [self.log_file(row.id, attempt) for attempt in range(1, row.attempt + 1)]
            lines, end, is_all = await asyncio.to_thread(request_log.read, files, start)
            complete = row.state.ended and is_all
            return RequestLog(status=self._status(row, position), lines=lines, next=end, complete=complete)

        def enough(log: RequestLog) -> bool:
            return bool(log.lines) or log.complete or log.status.state != seen

        return await self._changes.wait(f"request:{request}", read, enough, seconds)

    async def all(self) -> list[RequestStatus]:
        """All that have not ended and the latest that have, in the order of their coming."""
        rows = await self._store.run(table.select_shown)
        queued: Counter[str] = Counter()
        statuses = []
        for row in rows:
            waits = row.state == _Q.QUEUED
            statuses.append(self._status(row, queued[row.pool] if waits else None))
            queued[row.pool] += waits
        return statuses

    async def queued(self) -> dict[str, int]:
        """How many wait, by pool."""
        query = "SELECT pool, count(*) FROM requests WHERE state = 'QUEUED' GROUP BY pool"
        return await self._store.run(lambda c: dict(c.execute(query).fetchall()))

    async def dataset(self, name: str) -> Row | None:
        """The newest request that was to write the dataset."""
        return await self._store.run(lambda c: table.of_dataset(c, name))

    async def datasets(self) -> dict[str, Row]:
        """The newest request of each dataset."""
        return await self._store.run(lambda c: {row.dataset: row for row in table.select(c, "dataset <> ''")})

    async def forget_dataset(self, name: str) -> None:
        """It was removed: what had been asked of it says nothing about the next of that name."""
        await self._store.run(lambda c: c.execute("UPDATE requests SET dataset = '' WHERE dataset = ?", (name,)))

    async def accept(self, new: NewRequest) -> RequestStatus:
        """Queue a request whose bytes are on disk; the same id again changes nothing."""
        row, position = await self._store.run(lambda c: table.with_position(c, self._insert(c, new)))
        self._changes.announce(f"queue:{row.pool}")
        if await self._fail_hopeless([row.pool]):  # the pool went down in the meantime
            return await self.status(row.id)
        return self._status(row, position)

    async def cancel(self, request: str) -> RequestStatus:
        """End it at once while it is queued; otherwise its worker is told. What has ended stays as it is."""

        def cancel(connection: sqlite3.Connection) -> Row:
            row = table.get(connection, request)
            if row.state == _Q.QUEUED:
                return table.move_to(connection, row, _Q.CANCELLED)
            return row if row.state.ended else table.update(connection, row, cancel=True)

        row = await self._store.run(cancel)
        if held := self._held.get(request):
            held.cancel = True
            self._changes.announce(f"orders:{held.replica}")
        if row.state.ended:
            self._ended(row)
        return await self.status(request)

    # -- for workers ---------------------------------------------------------------------------------------------

    async def lease(self, pool: str, replica: str) -> Lease | None:
        """The oldest queued request of the pool, or None.

        One that this replica was given and has not begun comes first: its answer was lost on the way.
        """

        def lease(connection: sqlite3.Connection) -> Row | None:
            lost = table.first(
                connection, "state = 'LEASED' AND NOT cancel AND pool = ? AND replica = ?", pool, replica
            )
            if lost is not None:
                return lost
            row = table.first(connection, "state = 'QUEUED' AND pool = ?", pool)
            if row is None:
                return None
            return table.move_to(connection, row, _Q.LEASED, replica=replica, attempt=row.attempt + 1)

        row = await self._store.run(lease)
        if row is None:
            return None
        self._held[row.id] = _Held(row)
        self._changes.announce(f"request:{row.id}")
        return Lease(
            id=row.id,
            kind=row.kind,
            attempt=row.attempt,
            request=str(self.request_file(row.id)),
            result=str(self.result_file(row.id, row.attempt)),
            user=row.user,
        )

    async def started(self, request: str, replica: str, attempt: int) -> None:
        await self._store.run(lambda c: table.move_to(c, _held_by(c, request, replica, attempt), _Q.RUNNING))
        self._named(request, replica)
        self._changes.announce(f"request:{request}")

    async def said(self, request: str, replica: str, attempt: int, at: int, lines: bytes) -> None:
        """Keep what a running request has said, at its place in the attempt's log."""
        await self._store.run(lambda c: _held_by(c, request, replica, attempt))
        await asyncio.to_thread(request_log.write, self.log_file(request, attempt), at, lines)
        self._named(request, replica)
        self._changes.announce(f"request:{request}")

    def progress(self, request: str, replica: str, progress: DumpProgress) -> None:
        held = self._named(request, replica)
        if held is None:
            raise Conflict(f"request {request} is not leased to replica {replica}")
        held.progress = progress

    def claimed(self, replica: str, running: Iterable[str]) -> None:
        """The worker of `replica` has just said that it holds these."""
        for request in running:
            self._named(request, replica)

    def cancels(self, replica: str) -> tuple[str, ...]:
        """Which requests that replica is to give up."""
        return tuple(name for name, held in self._held.items() if held.replica == replica and held.cancel)

    async def outcome(self, replica: str, outcome: Outcome) -> None:
        """Record how an attempt ended. Said twice it is acknowledged twice; of an older attempt it is a `Conflict`."""
        progress = self._held[outcome.id].progress if outcome.id in self._held else None

        def end(connection: sqlite3.Connection) -> Row:
            row = _held_by(connection, outcome.id, replica, outcome.attempt)
            if row.state.ended:
                return row
            if row.state == _Q.QUEUED:  # taken back while its worker was silent, and not given to another yet
                row = table.move_to(connection, row, _Q.LEASED)
            return table.move_to(
                connection,
                row,
                _end_state(outcome),
                error=outcome.error,
                result_bytes=outcome.result_bytes,
                progress=outcome.progress or progress or row.progress,
            )

        self._ended(await self._store.run(end))

    # -- when workers fail ---------------------------------------------------------------------------------------

    def silent(self) -> list[str]:
        """Held requests that no worker has named for too long."""
        limit = time.monotonic() - self._config.silence
        return [name for name, held in self._held.items() if held.seen < limit]

    def held_by(self, replica: str) -> list[str]:
        return [name for name, held in self._held.items() if held.replica == replica]

    async def take_back(self, requests: Iterable[str], why: str) -> None:
        """Queue requests again whose worker has lost them; cancelled ones and those that were tried too often end."""
        lost = {name: self._held.pop(name) for name in requests if name in self._held}

        def take_back(connection: sqlite3.Connection) -> list[Row]:
            held = [(table.get(connection, name), held) for name, held in lost.items()]
            same = [row for row, held in held if (row.replica, row.attempt) == (held.replica, held.attempt)]
            return [self._take_back(connection, row, why) for row in same]

        taken = await self._store.run(take_back)
        for row in taken:
            self._changes.announce(f"request:{row.id}")
            self._changes.announce(f"queue:{row.pool}")
            if row.state.ended:
                self._ended(row)
        await self._fail_hopeless({row.pool for row in taken})

    async def fail_hopeless(self, pool: str) -> None:
        """Fail all that waits for `pool`, if no replica of it will ever take it."""
        await self._fail_hopeless([pool])

    async def fail_other_models(self, pool: str, model: ModelIdentity) -> None:
        """Fail what waits for `pool` and was made for another model than the one that it turned out to hold."""
        await self._fail(pool, lambda row: fingerprint_error(pool, model, row.fingerprint))

    # -- inside --------------------------------------------------------------------------------------------------

    async def _fail_hopeless(self, pools: Iterable[str]) -> bool:
        refusals = [(pool, refusal) for pool in pools if (refusal := self._pools.refusal(pool))]
        for pool, refusal in refusals:
            await self._fail(pool, lambda _, refusal=refusal: refusal)  # type: ignore[misc]  # mypy knows no such default
        return bool(refusals)

    async def _fail(self, pool: str, reason: Callable[[Row], HpcError | None]) -> None:
        def fail(connection: sqlite3.Connection) -> list[Row]:
            waiting = [(row, reason(row)) for row in table.select(connection, "state = 'QUEUED' AND pool = ?", pool)]
            return [table.move_to(connection, row, _Q.FAILED, error=e.report()) for row, e in waiting if e]

        for row in await self._store.run(fail):
            self._ended(row)

    def _insert(self, connection: sqlite3.Connection, new: NewRequest) -> Row:
        known = table.find(connection, new.id)
        if known is not None:
            return known
        self._check_quota(connection, new.user)
        if new.dump is not None:
            folder = dataset_folder(self._config.places.datasets, new.dump.name)
            check_dataset_is_free(new.dump, table.of_dataset(connection, new.dump.name), folder)
        row = table.insert(
            connection,
            id=new.id,
            kind=new.kind,
            pool=new.pool,
            state=_Q.RECEIVED,
            user=new.user,
            times={_Q.RECEIVED: new.received},
            fingerprint=new.fingerprint,
            dataset=new.dump.name if new.dump else "",
            dump=new.dump,
        )
        return table.move_to(connection, row, _Q.QUEUED)

    def _check_quota(self, connection: sqlite3.Connection, user: str) -> None:
        query = "SELECT count(*) FROM requests WHERE state = 'QUEUED' AND user = ?"
        count = connection.execute(query, (user,)).fetchone()[0]
        if count >= self._config.queued_per_user:
            raise Conflict(
                f"{user} has {count} requests in the queue, and may not have more",
                next="wait until some have run, or cancel some",
            )

    def _take_back(self, connection: sqlite3.Connection, row: Row, why: str) -> Row:
        if row.state not in _HELD:
            return row
        if row.cancel:
            return table.move_to(connection, row, _Q.CANCELLED)
        if row.attempt >= self._config.attempts:
            error = ReplicaFailed(
                f"request {row.id} was tried {row.attempt} times, and each time its worker was lost",
                where=f"pool {row.pool}, replica {row.replica}",
                why=why,
                next=f"see the worker's log: `nnsight-hpc logs {row.pool}`",
            )
            return table.move_to(connection, row, _Q.FAILED, error=error.report())
        return table.move_to(connection, row, _Q.QUEUED, note=f"queued again after attempt {row.attempt}: {why}")

    def _named(self, request: str, replica: str) -> _Held | None:
        held = self._held.get(request)
        if held is None or held.replica != replica:
            return None
        held.seen = time.monotonic()
        return held

    def _ended(self, row: Row) -> None:
        """Wake who waits, and remove what is not needed any more: the request, and results of attempts that lost."""
        self._held.pop(row.id, None)
        self._changes.announce(f"request:{row.id}")
        self.request_file(row.id).unlink(missing_ok=True)
        for attempt in range(1, row.attempt + (row.state != _Q.COMPLETED)):
            self.result_file(row.id, attempt).unlink(missing_ok=True)

    def _status(self, row: Row, position: int | None) -> RequestStatus:
        held = self._held.get(row.id)
        return RequestStatus(
            id=row.id,
            kind=row.kind,
            pool=row.pool,
            state=row.state,
            user=row.user,
            times=row.times,
            position=position,
            error=row.error,
            result_bytes=row.result_bytes,
            progress=held.progress if held and held.progress else row.progress,
            note=row.note,
        )


def _end_state(outcome: Outcome) -> RequestState:
    if outcome.cancelled:
        return _Q.CANCELLED
    return _Q.COMPLETED if outcome.error is None else _Q.FAILED


def _held_by(connection: sqlite3.Connection, request: str, replica: str, attempt: int) -> Row:
    row = table.get(connection, request)
    if (row.replica, row.attempt) != (replica, attempt):
        raise Conflict(
            f"attempt {attempt} of request {request} by replica {replica} does not count any more",
            why=f"it is {row.state}, attempt {row.attempt}" + (f" by replica {row.replica}" if row.replica else ""),
        )
    return row
