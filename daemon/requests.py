"""The queue: what is asked of the pools, from the moment it is stored until it has ended.

SQLite is the truth, and every change of state goes through `wire.states.move` in one transaction, which also writes the
request's story. Work does not wait for the disk, acknowledgements do: a request may be given to a worker, run there and be
answered by its result before any of that is on disk, and nothing else is said of it before. What is kept beside SQLite in
`memory` is what workers tell every few seconds, and what waits: who goes next is decided there (`scheduler`), and made so
where SQLite says that it still waits.
"""

from __future__ import annotations

import asyncio
import math
import time
from typing import TYPE_CHECKING

from nnsight_hpc.daemon import attempts, table
from nnsight_hpc.daemon.ahead import Ahead
from nnsight_hpc.daemon.dump_parts import PART
from nnsight_hpc.daemon.given_up import cancel, expire, pause
from nnsight_hpc.daemon.hopeless import Hopeless
from nnsight_hpc.daemon.losses import Loss, lose
from nnsight_hpc.daemon.memory import Memory
from nnsight_hpc.daemon.new_request import Accepted, enqueue
from nnsight_hpc.daemon.records import SPARE
from nnsight_hpc.daemon.request_files import RequestFiles
from nnsight_hpc.daemon.results import Results
from nnsight_hpc.daemon.retention import Retention
from nnsight_hpc.daemon.shares import charge, usages
from nnsight_hpc.daemon.starts import Starts
from nnsight_hpc.daemon.story import tell_of
from nnsight_hpc.wire.errors import Conflict, ErrorReport, HpcError, NotFound
from nnsight_hpc.wire.names import dump_of
from nnsight_hpc.wire.states import EndCause, RequestState

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Collection, Iterable

    from nnsight_hpc.daemon.attempts import Given
    from nnsight_hpc.daemon.backlog import Demand
    from nnsight_hpc.daemon.changes import Changes
    from nnsight_hpc.daemon.config import Config
    from nnsight_hpc.daemon.holdings import Held
    from nnsight_hpc.daemon.new_request import NewRequest
    from nnsight_hpc.daemon.pools import Pools
    from nnsight_hpc.daemon.store import Store
    from nnsight_hpc.daemon.table import Row
    from nnsight_hpc.daemon.turns import Waiting
    from nnsight_hpc.wire.workers import Lease, Outcome

_Q = RequestState


class Requests:
    """The requests of all pools: what changes them. `request_views` shows them."""

    def __init__(self, store: Store, changes: Changes, pools: Pools, config: Config) -> None:
        self._store, self._changes, self._pools, self._config = store, changes, pools, config
        self._listened = time.time()
        self._fresh: dict[str, attempts.Fresh] = {}
        self.files = RequestFiles(config.places.requests)
        self._memory = Memory(store, changes, pools, config, self.files)
        self.holdings, self.scheduler = self._memory.holdings, self._memory.scheduler
        self.counters, self.dumps = self._memory.counters, self._memory.dumps
        self._ahead = Ahead(store, self._memory.go_back)
        self.results = Results(store, self.files, config.result_bytes_per_user)
        self.retention = Retention(store, self.results, self.files, config)
        self.hopeless = Hopeless(store, pools, self._memory.moved)
        self.starts = Starts(store, changes, self._memory, self.files)

    async def load(self) -> None:
        """After a start: give the workers time to say what they still hold, and end what was ending. Load pools first."""
        where = "state IN ('QUEUED', 'LEASED', 'RUNNING')"
        self._memory.load(await self._store.run(lambda c: table.select(c, where)))
        self.scheduler.usage = await self._store.run(usages)
        await self.results.load()
        await self.hopeless.fail(self._memory.backlog.pools())
        await asyncio.to_thread(self.files.remove_unknown, await self._store.run(table.ids))

    def demand(self, pool: str) -> Demand:
        """What is asked of a pool just now."""
        return self._memory.backlog.demand(pool)

    # -- for people ----------------------------------------------------------------------------------------------

    async def accept(self, new: NewRequest, *, waits: bool = True) -> Accepted:
        """Queue a request; its row then, which is not on disk yet. The same id again changes nothing.

        `waits`: its sender waits for that, and not for its end.
        """
        datasets = self._config.places.datasets
        with self._memory.quota.coming(new.id, new.user) as refusal:
            work = self._ahead.start(lambda c: enqueue(c, new, datasets, refusal), [new.id], waits=waits)
            row = await work.done
        self._memory.announce(row)
        await self.hopeless.fail([row.pool])  # the pool may have gone down in the meantime
        return Accepted(row, work.durable)

    def fresh(self, request: str) -> attempts.Fresh | None:
        """The end of a request that has said nothing, while it is written to the disk."""
        return self._fresh.get(request)

    async def cancel(self, request: str) -> None:
        """End it at once while it is queued; otherwise its worker is told. What has ended stays as it is."""
        row = await self._store.run(lambda c: cancel(c, request))
        if held := self.holdings.find(request):
            held.cancel = True
            self._changes.announce(f"orders:{held.replica}")
        if row.state.ended:
            self._memory.moved(row)

    async def pause(self, request: str, *, paused: bool) -> Row:
        """Have a dump wait until it is resumed, after the batch that it runs; or have it go on. Its row then."""
        row = await self._store.run(lambda c: pause(c, request, paused=paused))
        if held := self.holdings.find(request):
            held.pause = row.paused
            self._changes.announce(f"orders:{held.replica}")
        self._memory.announce(row)
        return row

    # -- for workers ---------------------------------------------------------------------------------------------

    async def lease(self, pool: str, replica: str, most: int = 1, tokens: float = math.inf) -> list[Lease]:
        """What goes next in the pool and can end before the replica's walltime does, if anything.

        Several where they may share a forward, `most` at most, with so many tokens together. What the replica was given
        and has not begun comes first: the answer was lost on the way. A replica for which nothing waits helps with a dump.
        """
        for lost in self.dumps.lost(replica):
            self._memory.let_go(lost.id)
        given = await self._given_already(replica, most)
        while not given and (chosen := self.scheduler.next(pool, replica, most, tokens)):
            given = [one for one in await self._hand_out(chosen, replica) if one.is_with(replica)]
        policy = self._pools.get(pool).spec.policy
        most_bytes = policy.result_bytes if policy else None
        if not given and (part := self.dumps.lease(pool, replica, most_bytes)):
            return [part]
        return [attempts.lease_of(one, self.files, most_bytes) for one in given]

    async def confirm(self, replica: str, request: str, attempt: int) -> None:
        """Return once it is on disk that the replica has this attempt; raises `Conflict` and `NotFound` where it has not.

        Whoever writes a file for it needs that: otherwise the next daemon could give the same attempt to another one.
        """
        await self._store.run(lambda c: attempts.held_by(c, request, replica, attempt))

    def claimed(self, replica: str, running: Iterable[str]) -> None:
        """The worker of `replica` has just said that it holds these."""
        for request in running:
            self.holdings.named(request, replica)

    async def outcomes(self, replica: str, outcomes: Collection[Outcome]) -> list[ErrorReport | None]:
        """Record how attempts ended; of each, why it does not count, if so. Said twice it is acknowledged twice.

        Who waits for them hears it at once; their worker, which has the results, when they are on disk.
        """

        def end(connection: sqlite3.Connection) -> list[attempts.End | HpcError]:
            return [self._end(connection, replica, outcome) for outcome in outcomes]

        self.starts.unwritten(outcome.id for outcome in outcomes)
        if any(dump_of(outcome.id) != outcome.id for outcome in outcomes):  # parts come alone
            return [await self._part_ended(replica, outcome) for outcome in outcomes]
        work = self._ahead.start(end, [outcome.id for outcome in outcomes], waits=True)
        try:
            for outcome, found in zip(outcomes, await work.done, strict=True):
                self._heard(outcome, found)
            ends = await work.durable
        finally:
            for outcome in outcomes:
                self._fresh.pop(outcome.id, None)
        for found in ends:
            if isinstance(found, attempts.End):
                await self._kept(found)
        return [found.report() if isinstance(found, HpcError) else None for found in ends]

    # -- when workers fail ---------------------------------------------------------------------------------------

    def held_by(self, replica: str) -> list[str]:
        return self.holdings.of(replica)

    async def take_back(self, requests: Iterable[str], why: str, cause: EndCause) -> None:
        """Queue requests again whose worker has lost them, or end them.

        Cancelled ones end, those that were tried too often, those that have ended two workers, and those that take longer
        than a replica lives.
        """
        lost = {name: held for name in requests if (held := self._memory.let_go(name))}
        begun = self.starts.unwritten(lost)

        def take_back(connection: sqlite3.Connection) -> list[attempts.End]:
            for one in begun:  # it ran, and may be why they were lost
                attempts.begin(connection, [one], lost[one.id].replica)
            held = [(table.find(connection, name), held) for name, held in lost.items()]
            same = [
                (row, held) for row, held in held if row and (row.replica, row.attempt) == (held.replica, held.attempt)
            ]
            return [self._lose(connection, row, held, why, cause) for row, held in same]

        for held in lost.values():
            if held.kind == PART:
                await self._charge(held.user, time.time() - held.since)
        taken = await self._store.run(take_back)
        for found in taken:
            self._account(found)
            self._memory.moved(found.row)
        await self.hopeless.fail({found.row.pool for found in taken})

    async def expire(self) -> None:
        """End what has waited for too long."""
        limit = time.time() - self._config.expires
        old = self._memory.backlog.older(limit)
        for row in await self._store.run(lambda c: expire(c, old, limit)) if old else []:
            self._memory.moved(row)

    # -- inside --------------------------------------------------------------------------------------------------

    async def _given_already(self, replica: str, most: int) -> list[Given]:
        lost = self.holdings.not_begun(replica)
        found = await self._store.run(lambda c: attempts.given(c, table.get_all(c, lost))) if lost else []
        still = [one for one in found if one.is_with(replica)]
        batch = still[0].row.batch if still else ""
        return [one for one in still if one is still[0] or (batch and one.row.batch == batch)][:most]

    async def _hand_out(self, chosen: list[Waiting], replica: str) -> list[Given]:
        """Give these to a replica; all of them as they are now. Nobody else chooses them in the meantime.

        A run that is given again by the next daemon harms nothing; two that write one dataset do, so a dump is on disk first.
        """
        names, writes = [one.id for one in chosen], any(one.kind != "run" for one in chosen)
        for one in chosen:
            self._memory.backlog.take(one)
        try:
            work = self._ahead.start(lambda c: attempts.hand_out(c, names, replica), names, waits=writes)
            found = await (work.durable if writes else work.done)
        except BaseException:
            for one in chosen:
                self._memory.backlog.put_back(one)
            raise
        for given in found:
            if given.is_with(replica):
                self.holdings.take(given.row, share=1 / len(found), quiet=given.row.attempt == 1)
            self._memory.announce(given.row)
        return found

    def _end(self, connection: sqlite3.Connection, replica: str, outcome: Outcome) -> attempts.End | HpcError:
        try:
            return attempts.end(connection, replica, outcome, self.dumps.progress(outcome.id), self._config.half_life)
        except (Conflict, NotFound) as error:
            return error

    async def _part_ended(self, replica: str, outcome: Outcome) -> ErrorReport | None:
        """A replica does not help with a dump any more. That it failed is told, and means nothing for the dump."""
        held = self.holdings.named(outcome.id, replica)
        if held is None:
            return Conflict(f"replica {replica} does not help with {dump_of(outcome.id)} any more").report()
        if outcome.error is not None:
            self.dumps.failed(held)
            told = f"replica {replica} could not help with it: {outcome.error.what}"
            await self._store.run(lambda c: tell_of(c, table.get(c, dump_of(outcome.id)), told))
        self._memory.let_go(held.id)
        await self._charge(held.user, outcome.seconds)
        return None

    async def _charge(self, user: str, seconds: float) -> None:
        self.scheduler.usage[user] = await self._store.run(lambda c: charge(c, user, seconds, self._config.half_life))

    def _lose(self, connection: sqlite3.Connection, row: Row, held: Held, why: str, cause: EndCause) -> attempts.End:
        usage = attempts.charge_lost(connection, row, held, self._config.half_life, self._listened)
        return attempts.End(lose(connection, row, self._loss(row, held, why, cause)), usage)

    def _heard(self, outcome: Outcome, found: attempts.End | HpcError) -> None:
        """What came of an outcome; it is not on disk yet."""
        if isinstance(found, attempts.End):
            held = self.holdings.find(outcome.id)
            if held is not None and held.quiet and found.row.result_bytes == len(outcome.result):
                self._fresh[outcome.id] = attempts.Fresh(found.row, outcome.result)
            self._account(found, outcome.seconds)
            self._memory.announce(found.row)
        elif isinstance(found, NotFound):  # it never came to the disk
            self._memory.let_go(outcome.id)

    async def _kept(self, end: attempts.End) -> None:
        """It is on disk that an attempt has ended."""
        self._memory.clear(end.row)
        if end.usage is not None and end.row.state == _Q.COMPLETED:
            await self.results.keep(end.row)

    def _account(self, end: attempts.End, seconds: float | None = None) -> None:
        """An attempt has ended; `seconds` are what it has cost, where it is known of a whole one."""
        if end.usage is not None:
            self.scheduler.usage[end.row.user] = end.usage
            if seconds is not None and end.row.kind == "run":
                self.scheduler.ran(end.row.pool, seconds)

    def _loss(self, row: Row, held: Held, why: str, cause: EndCause) -> Loss:
        """In the last seconds of a walltime it is that which ends a job, though all that its worker sees is a signal."""
        if cause.blameless and self._pools.left(row.replica) < SPARE:
            cause = EndCause.WALLTIME
        longest, company = self._pools.longest(row.pool), held.share < 1
        return Loss(why, cause, self._config.attempts, longest, self._listened, company)
