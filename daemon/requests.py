"""The queue: what is asked of the pools, from the moment it is stored until it has ended.

SQLite is the truth, and every change of state goes through `wire.states.move` in one transaction, which also writes the
request's story. What is kept beside it in memory is what workers tell every few seconds (`holdings`), and what waits
(`backlog`): who goes next is decided there (`scheduler`), and made so where SQLite says that it still waits.
"""

from __future__ import annotations

import asyncio
import math
import time
from typing import TYPE_CHECKING

from nnsight_hpc.daemon import attempts, request_log, table
from nnsight_hpc.daemon.backlog import HELD, Backlog
from nnsight_hpc.daemon.counters import Counters
from nnsight_hpc.daemon.given_up import cancel, expire, refuse
from nnsight_hpc.daemon.holdings import Holdings
from nnsight_hpc.daemon.losses import Loss, lose
from nnsight_hpc.daemon.new_request import enqueue
from nnsight_hpc.daemon.records import SPARE
from nnsight_hpc.daemon.refusals import fingerprint_error, needs_error
from nnsight_hpc.daemon.request_files import RequestFiles
from nnsight_hpc.daemon.retention import forget, forget_stories
from nnsight_hpc.daemon.room import Room, remove_oldest
from nnsight_hpc.daemon.scheduler import Scheduler
from nnsight_hpc.daemon.shares import usages
from nnsight_hpc.wire.errors import Conflict, ErrorReport, HpcError, NotFound
from nnsight_hpc.wire.states import EndCause, RequestState

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Collection, Iterable

    from nnsight_hpc.daemon.backlog import Demand
    from nnsight_hpc.daemon.changes import Changes
    from nnsight_hpc.daemon.config import Config
    from nnsight_hpc.daemon.holdings import Held
    from nnsight_hpc.daemon.new_request import NewRequest
    from nnsight_hpc.daemon.pools import Pools
    from nnsight_hpc.daemon.queues import Waiting
    from nnsight_hpc.daemon.store import Store
    from nnsight_hpc.daemon.table import Row
    from nnsight_hpc.wire.messages import DumpProgress, ModelIdentity
    from nnsight_hpc.wire.workers import Begun, Lease, Outcome

_Q = RequestState
_MOMENT = 0.02
"""Seconds after which it is written down that a request runs; most have ended by then, and it would delay that."""


class Requests:
    """The requests of all pools: what changes them. `request_views` shows them."""

    def __init__(self, store: Store, changes: Changes, pools: Pools, config: Config) -> None:
        self._store, self._changes, self._pools, self._config = store, changes, pools, config
        self._backlog, self._listened, self._room = Backlog(), time.time(), Room(config.result_bytes_per_user)
        self._just_begun: dict[str, Begun] = {}
        self.holdings, self.files = Holdings(), RequestFiles(config.places.requests)
        self.scheduler, self.counters = Scheduler(self._backlog, self.holdings, pools, config), Counters()

    async def load(self) -> None:
        """After a start: give the workers time to say what they still hold, and end what was ending. Load pools first."""
        for row in await self._store.run(lambda c: table.select(c, "state IN ('QUEUED', 'LEASED', 'RUNNING')")):
            self._backlog.note(row)
            self.counters.note(row)
            if row.state in HELD:
                self.holdings.take(row)
        self.scheduler.usage = await self._store.run(usages)
        await self._store.run(self._room.load)
        await self._fail_hopeless(self._backlog.pools())
        await asyncio.to_thread(self.files.remove_unknown, await self._store.run(table.ids))

    def demand(self, pool: str) -> Demand:
        """What is asked of a pool just now."""
        return self._backlog.demand(pool)

    def counts(self, pool: str) -> tuple[int, int]:
        """How many wait and run for a pool."""
        return self._backlog.counts(pool)

    # -- for people ----------------------------------------------------------------------------------------------

    async def accept(self, new: NewRequest) -> Row:
        """Queue a request whose bytes are on disk; its row then. The same id again changes nothing."""
        row = await self._store.run(lambda c: enqueue(c, new, self._config))
        self._moved(row)
        await self._fail_hopeless([row.pool])  # the pool may have gone down in the meantime
        return row

    async def cancel(self, request: str) -> None:
        """End it at once while it is queued; otherwise its worker is told. What has ended stays as it is."""
        row = await self._store.run(lambda c: cancel(c, request))
        if held := self.holdings.find(request):
            held.cancel = True
            self._changes.announce(f"orders:{held.replica}")
        if row.state.ended:
            self._moved(row)

    async def forget_dataset(self, name: str) -> None:
        """It was removed: what had been asked of it says nothing about the next of that name."""
        await self._store.run(lambda c: c.execute("UPDATE requests SET dataset = '' WHERE dataset = ?", (name,)))

    # -- for workers ---------------------------------------------------------------------------------------------

    async def lease(self, pool: str, replica: str, most: int = 1, tokens: float = math.inf) -> list[Lease]:
        """What goes next in the pool and can end before the replica's walltime does, if anything.

        Several where they may share a forward, `most` at most, with so many tokens together. What the replica was given
        and has not begun comes first: the answer was lost on the way.
        """
        rows = await self._given_already(replica, most)
        while not rows and (chosen := self.scheduler.next(pool, replica, most, tokens)):
            rows = [row for row in await self._hand_out(chosen, replica) if _is_given(row, replica)]
        policy = self._pools.get(pool).spec.policy
        return [attempts.lease_of(row, self.files, policy.result_bytes if policy else None) for row in rows]

    async def started(self, replica: str, begun: Collection[Begun]) -> None:
        """These run now, as far as the replica holds them; it is written down of those that run for more than a moment."""
        self._just_begun |= {one.id: one for one in begun}
        await asyncio.sleep(_MOMENT)
        still = self._begun_of(one.id for one in begun)
        for row in await self._store.run(lambda c: attempts.begin(c, still, replica)) if still else []:
            if held := self.holdings.named(row.id, replica):
                held.begin(row)
            self._moved(row)

    def _begun_of(self, requests: Iterable[str]) -> list[Begun]:
        """Those of them of which it is to be written down still that they have begun; from now on it is not."""
        return [begun for one in requests if (begun := self._just_begun.pop(one, None))]

    async def said(self, request: str, replica: str, attempt: int, at: int, lines: bytes) -> None:
        """Keep what a running request has said, at its place in the attempt's log."""
        await self._store.run(lambda c: attempts.held_by(c, request, replica, attempt))
        await asyncio.to_thread(request_log.write, self.files.log(request, attempt), at, lines)
        self.holdings.named(request, replica)
        self._changes.announce(f"request:{request}")
        self._changes.announce(f"news:{request}")

    def progress(self, request: str, replica: str, progress: DumpProgress) -> None:
        held = self.holdings.named(request, replica)
        if held is None:
            raise Conflict(f"request {request} is not leased to replica {replica}")
        held.progress = progress
        self._changes.announce(f"request:{request}")

    def claimed(self, replica: str, running: Iterable[str]) -> None:
        """The worker of `replica` has just said that it holds these."""
        for request in running:
            self.holdings.named(request, replica)

    async def outcomes(self, replica: str, outcomes: Collection[Outcome]) -> list[ErrorReport | None]:
        """Record how attempts ended; of each, why it does not count, if so. Said twice it is acknowledged twice."""

        def end(connection: sqlite3.Connection) -> list[attempts.End | HpcError]:
            return [self._end(connection, replica, outcome) for outcome in outcomes]

        self._begun_of(outcome.id for outcome in outcomes)
        ends = await self._store.run(end)
        for outcome, found in zip(outcomes, ends, strict=True):
            if isinstance(found, attempts.End):
                self._ended(found, outcome.seconds)
                await self._make_room(found.row.user)
        return [found.report() if isinstance(found, HpcError) else None for found in ends]

    # -- when workers fail ---------------------------------------------------------------------------------------

    def held_by(self, replica: str) -> list[str]:
        return self.holdings.of(replica)

    async def take_back(self, requests: Iterable[str], why: str, cause: EndCause) -> None:
        """Queue requests again whose worker has lost them, or end them.

        Cancelled ones end, those that were tried too often, those that have ended two workers, and those that take longer
        than a replica lives.
        """
        lost = {name: held for name in requests if (held := self._let_go(name))}
        begun = self._begun_of(lost)

        def take_back(connection: sqlite3.Connection) -> list[attempts.End]:
            for one in begun:  # it ran, and may be why they were lost
                attempts.begin(connection, [one], lost[one.id].replica)
            held = [(table.get(connection, name), held) for name, held in lost.items()]
            same = [(row, held) for row, held in held if (row.replica, row.attempt) == (held.replica, held.attempt)]
            return [self._lose(connection, row, held, why, cause) for row, held in same]

        taken = await self._store.run(take_back)
        for found in taken:
            self._ended(found)
        await self._fail_hopeless({found.row.pool for found in taken})

    async def expire(self) -> None:
        """End what has waited for too long."""
        limit = time.time() - self._config.expires
        old = self._backlog.older(limit)
        for row in await self._store.run(lambda c: expire(c, old, limit)) if old else []:
            self._moved(row)

    async def forget_old(self) -> None:
        """Forget what ended more than `Config.keep` ago: its row, its story, its result and its log."""
        before, datasets = time.time() - self._config.keep, self._config.places.datasets
        while rows := await self._store.run(lambda c: forget(c, before, datasets)):
            for row in rows:
                if row.state == _Q.COMPLETED:
                    self._room.give(row)
            await asyncio.to_thread(self.files.remove, rows)
        await self._store.run(lambda c: forget_stories(c, before))

    async def fail_hopeless(self, pool: str) -> None:
        """Fail all that waits for `pool`, if no replica of it will ever take it."""
        await self._fail_hopeless([pool])

    async def fail_other_models(self, pool: str, model: ModelIdentity) -> None:
        """Fail what waits for `pool` and was made for another model than the one that it turned out to hold."""
        await self._fail(pool, lambda row: fingerprint_error(pool, model, row.fingerprint))

    async def fail_too_long(self, pool: str) -> None:
        """Fail what waits for `pool` and needs more than a replica can give, now that a replica has loaded."""
        longest = self._pools.longest(pool)
        await self._fail(pool, lambda row: needs_error(pool, row.needs, longest))

    # -- inside --------------------------------------------------------------------------------------------------

    async def _given_already(self, replica: str, most: int) -> list[Row]:
        lost = self.holdings.not_begun(replica)
        rows = await self._store.run(lambda c: table.get_all(c, lost)) if lost else []
        rows = [row for row in rows if _is_given(row, replica)]
        return [row for row in rows if row is rows[0] or (row.batch and row.batch == rows[0].batch)][:most]

    async def _hand_out(self, chosen: list[Waiting], replica: str) -> list[Row]:
        """Give these to a replica; all of them as they are now. Nobody else chooses them in the meantime."""
        for one in chosen:
            self._backlog.take(one)
        try:
            rows = await self._store.run(lambda c: attempts.hand_out(c, [one.id for one in chosen], replica))
        except BaseException:
            for one in chosen:
                self._backlog.put_back(one)
            raise
        for row in rows:
            if _is_given(row, replica):
                self.holdings.take(row, share=1 / len(rows))
            self._moved(row)
        return rows

    def _end(self, connection: sqlite3.Connection, replica: str, outcome: Outcome) -> attempts.End | HpcError:
        held = self.holdings.find(outcome.id)
        try:
            return attempts.end(connection, replica, outcome, held.progress if held else None, self._config.half_life)
        except (Conflict, NotFound) as error:
            return error

    def _lose(self, connection: sqlite3.Connection, row: Row, held: Held, why: str, cause: EndCause) -> attempts.End:
        usage = attempts.charge_lost(connection, row, held, self._config.half_life, self._listened)
        return attempts.End(lose(connection, row, self._loss(row, held, why, cause)), usage)

    def _ended(self, end: attempts.End, seconds: float | None = None) -> None:
        """An attempt has; `seconds` are what it has cost, where it is known of a whole one."""
        if end.usage is not None:
            self.scheduler.usage[end.row.user] = end.usage
            if end.row.state == _Q.COMPLETED:
                self._room.take(end.row)
            if seconds is not None and end.row.kind == "run":
                self.scheduler.ran(end.row.pool, seconds)
        self._moved(end.row)

    async def _make_room(self, user: str) -> None:
        lacks = self._room.lacks(user)
        for row in await self._store.run(lambda c: remove_oldest(c, user, lacks)) if lacks else []:
            self._room.give(row)
            self.files.result(row.id, row.attempt).unlink(missing_ok=True)

    def _loss(self, row: Row, held: Held, why: str, cause: EndCause) -> Loss:
        """In the last seconds of a walltime it is that which ends a job, though all that its worker sees is a signal."""
        if cause.blameless and self._pools.left(row.replica) < SPARE:
            cause = EndCause.WALLTIME
        longest, company = self._pools.longest(row.pool), held.share < 1
        return Loss(why, cause, self._config.attempts, longest, self._listened, company)

    async def _fail_hopeless(self, pools: Iterable[str]) -> None:
        for pool in pools:
            if refusal := self._pools.refusal(pool):
                await self._fail(pool, lambda _, refusal=refusal: refusal)  # type: ignore[misc]  # mypy knows no such default

    async def _fail(self, pool: str, reason: Callable[[Row], HpcError | None]) -> None:
        def fail(connection: sqlite3.Connection) -> list[Row]:
            waiting = [(row, reason(row)) for row in table.select(connection, "state = 'QUEUED' AND pool = ?", pool)]
            return [refuse(connection, row, error) for row, error in waiting if error]

        for row in await self._store.run(fail):
            self._moved(row)

    def _moved(self, row: Row) -> None:
        """A request has another state: count it there, wake who waits, remove what nobody needs of an ended one."""
        self._backlog.note(row)
        self.counters.note(row)
        self._changes.announce(f"request:{row.id}")
        if row.state == _Q.QUEUED:
            self._changes.announce(f"queue:{row.pool}")
            for replica in self.holdings.dumping(row.pool):
                self._changes.announce(f"orders:{replica}")
        if row.state not in HELD:
            self._let_go(row.id)
        if row.state.ended:
            self._changes.announce(f"news:{row.id}")
            self.files.remove_of_ended(row)

    def _let_go(self, request: str) -> Held | None:
        """No worker holds it (any more); its user may have another run, if he had as many as he may."""
        held = self.holdings.find(request)
        if held is not None and self.scheduler.is_barred(held.user):
            for pool in self._backlog.pools():
                self._changes.announce(f"queue:{pool}")
        return self.holdings.drop(request)


def _is_given(row: Row, replica: str) -> bool:
    return row.state == _Q.LEASED and row.replica == replica
