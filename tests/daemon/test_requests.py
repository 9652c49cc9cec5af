"""The queue under any order of events: nothing is lost, nothing runs twice at a time, and memory agrees with the disk."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnsight_hpc.daemon import small, starts, table
from nnsight_hpc.daemon.backlog import HELD, Demand
from nnsight_hpc.daemon.changes import Changes
from nnsight_hpc.daemon.config import Config
from nnsight_hpc.daemon.database import take_over
from nnsight_hpc.daemon.new_request import NewRequest
from nnsight_hpc.daemon.pools import Pools
from nnsight_hpc.daemon.requests import Requests
from nnsight_hpc.daemon.store import Store
from nnsight_hpc.daemon.story import Stories
from nnsight_hpc.wire.errors import Conflict, ErrorReport
from nnsight_hpc.wire.names import new_request_id
from nnsight_hpc.wire.places import places_at
from nnsight_hpc.wire.pools import PoolSpec
from nnsight_hpc.wire.states import EndCause, RequestState
from nnsight_hpc.wire.workers import Begun, Lease, Outcome

REPLICAS = ("p-1", "p-2")
EVENTS = st.one_of(
    st.tuples(st.just("accept"), st.sampled_from(["run", "dump"])),
    st.tuples(st.just("lease"), st.sampled_from(REPLICAS)),
    st.tuples(st.just("lease"), st.sampled_from(REPLICAS)),
    st.tuples(st.just("start"), st.sampled_from(REPLICAS)),
    st.tuples(st.just("end"), st.sampled_from(REPLICAS), st.sampled_from([None, "failed", "cancelled", "gave way"])),
    st.tuples(st.just("lose"), st.sampled_from(REPLICAS), st.sampled_from(EndCause)),
    st.tuples(st.just("crash"), st.just("p-1"), st.just(EndCause.CRASHED)),
    st.tuples(st.just("crash"), st.sampled_from(REPLICAS), st.sampled_from(EndCause)),
    st.tuples(st.just("cancel"), st.integers(0, 9)),
    st.tuples(st.just("restart")),
)


def _runs_first(rows: list[table.Row]) -> list[table.Row]:
    """What waits, of one user: runs before dumps, each in the order of their coming."""
    return sorted((r for r in rows if r.state == RequestState.QUEUED), key=lambda r: (r.kind == "dump", r.sequence))


class Daemon:
    """The queue of a pool ``p``, and what its workers believe that they hold."""

    def __init__(self, config: Config, store: Store) -> None:
        self.config, self.store = config, store
        self.held: dict[str, Lease | None] = dict.fromkeys(REPLICAS)
        self.ids: list[str] = []
        self.ended: dict[str, table.Row] = {}

    async def restart(self) -> None:
        changes = Changes()
        pools = Pools(self.store, changes, self.config, Stories(self.store))
        await pools.load()
        self.requests = Requests(self.store, changes, pools, self.config)
        await self.requests.load()
        self.pools = pools

    async def accept(self, kind: str) -> None:
        self.ids.append(new_request_id())
        new = NewRequest(id=self.ids[-1], kind=kind, pool="p", user="u", received=1.0, frame=b"frame")
        await self.requests.accept(new)

    async def lease(self, replica: str) -> None:
        rows = await self.rows()
        mine = [r for r in rows if r.state == RequestState.LEASED and r.replica == replica and not r.cancel]
        expected = [*mine, *_runs_first(rows)][:1]
        leases = await self.requests.lease("p", replica)
        assert [row.id for row in expected] == [lease.id for lease in leases]
        self.held[replica] = leases[0] if leases else self.held[replica]

    async def start(self, replica: str) -> None:
        if lease := self.held[replica]:
            await self.requests.starts.started(replica, [Begun(id=lease.id, attempt=lease.attempt)])

    async def end(self, replica: str, how: str | None) -> None:
        if lease := self.held[replica]:
            error = ErrorReport("HpcError", "no") if how == "failed" else None
            outcome = Outcome(
                id=lease.id,
                attempt=lease.attempt,
                error=error,
                cancelled=how == "cancelled",
                gave_way=how == "gave way" and lease.kind == "dump",
            )
            [refused] = await self.requests.outcomes(replica, [outcome])
            assert refused is None or refused.kind == "Conflict"
            self.held[replica] = None

    async def lose(self, replica: str, cause: EndCause) -> None:
        await self.requests.take_back(self.requests.held_by(replica), "its worker is gone", cause)

    async def crash(self, replica: str, cause: EndCause) -> None:
        """It ends as it runs what it is given."""
        await self.lease(replica)
        await self.start(replica)
        await self.lose(replica, cause)

    async def cancel(self, number: int) -> None:
        if number < len(self.ids):
            await self.requests.cancel(self.ids[number])

    async def rows(self) -> list[table.Row]:
        return await self.store.run(lambda c: table.select(c, "true"))

    async def check(self) -> None:
        rows = await self.rows()
        assert [row.id for row in rows] == self.ids
        waiting = [row.times[RequestState.QUEUED] for row in rows if row.state == RequestState.QUEUED]
        held = [row for row in rows if row.state in HELD]
        assert self.requests.demand("p") == Demand(len(waiting), len(held), min(waiting, default=None))
        assert sorted(row.id for row in held) == sorted(name for r in REPLICAS for name in self.requests.held_by(r))
        for row in rows:
            assert (
                row == self.ended.setdefault(row.id, row) if row.id in self.ended or row.state.ended else row.kills < 2
            )
            assert row.attempt - row.gave_way <= self.config.attempts or row.kind == "dump"
            kept = await self.store.run(lambda c, row=row: small.body(c, row))
            assert kept == (b"" if row.state.ended else b"frame")


@settings(max_examples=60, deadline=None)
@given(st.lists(EVENTS, max_size=30))
def test_nothing_is_lost_whatever_happens(tmp_path_factory, events):
    """Each is leased in its order, runs before dumps, by one worker; what has ended stays so; a restart changes nothing."""
    places = places_at(tmp_path_factory.mktemp("home"))
    places.requests.mkdir()
    config = Config(executor="slurm", places=places)

    async def scenario() -> None:
        store = Store(take_over(places, 1), lambda: None)
        daemon = Daemon(config, store)
        await daemon.restart()
        try:
            await daemon.pools.put(PoolSpec(name="p", model="m"))
            for name, *values in events:
                await _try(daemon, name, *values)
                await daemon.check()
        finally:
            await store.close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(starts, "_MOMENT", 0.0)
        asyncio.run(scenario())


async def _try(daemon: Daemon, name: str, *values: Any) -> None:
    """What a worker says of an attempt that does not count any more is a conflict."""
    try:
        await getattr(daemon, name)(*values)
    except Conflict:
        assert name in ("start", "end", "crash")
        daemon.held[values[0]] = None
