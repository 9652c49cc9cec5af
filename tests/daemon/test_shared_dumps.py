"""Dumps of several users in one pool: how the replicas that have nothing else to do are shared out among them."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, NamedTuple

import pytest

from nnsight_hpc.daemon.changes import Changes
from nnsight_hpc.daemon.config import Config
from nnsight_hpc.daemon.database import take_over
from nnsight_hpc.daemon.new_request import NewRequest
from nnsight_hpc.daemon.pools import Pools
from nnsight_hpc.daemon.requests import Requests
from nnsight_hpc.daemon.shares import Usage
from nnsight_hpc.daemon.store import Store
from nnsight_hpc.daemon.story import Stories
from nnsight_hpc.wire.messages import DumpProgress, DumpSpec
from nnsight_hpc.wire.names import dump_of, new_request_id
from nnsight_hpc.wire.places import places_at
from nnsight_hpc.wire.pools import PoolSpec
from nnsight_hpc.wire.workers import Lease, Outcome, SliceAsk, SliceProgress, SlicesOpened
from tests.daemon.known import replica

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

SLICE = 5.0
"""Seconds that a replica takes for a slice."""


class Writing(NamedTuple):
    """What a replica is at: what it has leased and since when, and the slice that it writes, if any.

    It does that `until` then; before the first slice it makes the corpus ready.
    """

    lease: Lease
    since: float
    until: float
    is_ready: bool = False
    slice: int | None = None


class World:
    """A pool ``p`` whose simulated replicas write dumps through the real queue; its clock is all that passes.

    `written` counts how often each slice was written, and `begun` how often a replica has taken up a dump or a part, which
    takes it `beginning` seconds.
    """

    def __init__(self, requests: Requests, clock: list[float], replicas: int, beginning: float) -> None:
        self.requests, self._clock, self._beginning = requests, clock, beginning
        self._slices: dict[str, int] = {}
        self.users: dict[str, str] = {}
        self.at: dict[str, Writing | None] = {f"p-{number}": None for number in range(replicas)}
        self.written: Counter[tuple[str, int]] = Counter()
        self.had: Counter[str] = Counter()
        self.begun = 0

    async def dump(self, user: str, slices: int = 10_000) -> str:
        """A dump of so many slices is asked for."""
        name = new_request_id()
        spec = DumpSpec(name=f"of-{user}-{name}", captures=("x",), corpus_fingerprint="f")
        new = NewRequest(id=name, kind="dump", pool="p", user=user, received=time.time(), dump=spec)
        await (await self.requests.accept(new)).durable
        self._slices[name], self.users[name] = slices, user
        return name

    def writers(self) -> Counter[str]:
        """How many replicas write for each user."""
        return Counter(self.users[dump_of(one.lease.id)] for one in self.at.values() if one)

    async def run(self, seconds: float) -> None:
        for _ in range(int(seconds)):
            left = [name for name, one in self.at.items() if one and not await self._goes_on(name, one)]
            for name in left:  # all have asked before the first is given something else
                await self._end(name)
            for name in [name for name, one in self.at.items() if one is None]:
                await self._begin(name)
            self._clock[0] += 1.0
            self.had += self.writers()

    async def _goes_on(self, name: str, one: Writing) -> bool:
        if one.lease.id in self.requests.scheduler.gives_way(name):
            return False
        if time.time() < one.until:
            return True
        if not one.is_ready:
            slices = self._slices[dump_of(one.lease.id)]
            opened = SlicesOpened(slices=slices, written=(), progress=DumpProgress(tokens_total=slices))
            await self.requests.dumps.open(one.lease.id, name, opened)
        written = None if one.slice is None else SliceProgress(slice=one.slice, tokens=1)
        if written is not None:
            self.written[dump_of(one.lease.id), one.slice] += 1
        given = await self.requests.dumps.next(one.lease.id, name, SliceAsk(written=written))
        self.at[name] = Writing(one.lease, one.since, time.time() + SLICE, is_ready=True, slice=given.slice)
        return not (given.leave or given.complete)

    async def _end(self, name: str) -> None:
        lease, since, *_ = self.at[name]
        complete = (queue := self.requests.dumps.queue(lease.id)) is not None and queue.complete
        outcome = Outcome(id=lease.id, attempt=lease.attempt, seconds=time.time() - since, gave_way=not complete)
        assert await self.requests.outcomes(name, [outcome]) == [None]
        self.at[name] = None

    async def _begin(self, name: str) -> None:
        for lease in await self.requests.lease("p", name):
            self.at[name] = Writing(lease, time.time(), time.time() + self._beginning)
            self.begun += 1


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Makes one, of so many replicas."""
    places, clock = places_at(tmp_path), [1e9]
    places.requests.mkdir()
    monkeypatch.setattr(time, "time", lambda: clock[0])
    config = Config(executor="slurm", places=places)

    @asynccontextmanager
    async def opened(replicas: int, beginning: float = 0.0) -> AsyncIterator[World]:
        store, changes = Store(take_over(places, 1), lambda: None), Changes()
        try:
            pools = Pools(store, changes, config, Stories(store))
            of = await pools.put(PoolSpec(name="p", model="m"))
            pools._replicas = {f"p-{number}": replica(f"p-{number}", of=of) for number in range(replicas)}
            yield World(Requests(store, changes, pools, config), clock, replicas, beginning)
        finally:
            await store.close()

    return opened


def test_idle_replicas_are_shared_out_evenly(world):
    """Two users who have had nothing, a dump each: of six replicas each has three, in the same moment and from then on."""

    async def scenario() -> None:
        async with world(6) as at:
            await at.dump("ada")
            await at.dump("bob")
            await at.run(2)
            assert at.writers() == {"ada": 3, "bob": 3}
            await at.run(300)
            assert (at.writers(), at.begun) == ({"ada": 3, "bob": 3}, 6)

    asyncio.run(scenario())


def test_a_dump_that_comes_when_all_are_busy_has_its_part_soon(world):
    """One helper gives way to it at once; two go over at the end of a slice, none in vain; no slice is written twice."""

    async def scenario() -> None:
        async with world(6) as at:
            await at.dump("ada")
            await at.run(12)
            assert at.writers() == {"ada": 6}
            at.requests.scheduler.usage["bob"] = Usage(6 * 12.0, time.time())  # as much as she
            bobs = await at.dump("bob")
            await at.run(2)
            assert [one.lease.id for one in at.at.values() if one].count(bobs) == 1
            await at.run(2 * SLICE)
            assert (at.writers(), at.begun) == ({"ada": 3, "bob": 3}, 6 + 3)
            assert max(at.written.values()) == 1

    asyncio.run(scenario())


def test_who_has_had_less_is_helped_until_both_have_had_the_same(world):
    """The other one keeps the replica that has his dump; then they share."""

    async def scenario() -> None:
        async with world(6) as at:
            at.requests.scheduler.usage = {"ada": Usage(400.0, time.time())}
            await at.dump("ada")
            await at.run(20)
            await at.dump("bob")
            await at.run(3 * SLICE)
            assert at.writers() == {"ada": 1, "bob": 5}
            await at.run(300)
            assert at.writers() == {"ada": 3, "bob": 3}

    asyncio.run(scenario())


@pytest.mark.parametrize("replicas", [3, 5, 7])
def test_an_odd_replica_takes_turns(world, replicas):
    """In half an hour both users have had the same, but for some turns, and it goes over a few times a minute at most."""

    async def scenario() -> None:
        async with world(replicas) as at:
            await at.dump("ada")
            await at.dump("bob")
            await at.run(1800)
            assert abs(at.had["ada"] - at.had["bob"]) <= 5 * at.requests._config.turn
            assert replicas < at.begun <= replicas + 1800 / (2 * at.requests._config.turn)
            assert max(at.written.values()) == 1

    asyncio.run(scenario())


def test_who_takes_long_to_begin_changes_sides_seldom(world):
    """What is lost by it is a tenth of its time at most; both users have had the same but for one such turn."""

    async def scenario() -> None:
        async with world(3, beginning=20.0) as at:
            await at.dump("ada")
            await at.dump("bob")
            await at.run(3600)
            assert abs(at.had["ada"] - at.had["bob"]) <= 2 * 11 * 20.0
            assert 3 < at.begun <= 3 + 3600 / (11 * 20.0)

    asyncio.run(scenario())


def test_the_dumps_of_one_user_count_together(world):
    """Who asks for more dumps has no more replicas for it, once each dump has its own; the older of his is helped first."""

    async def scenario() -> None:
        async with world(8) as at:
            first, _ = [await at.dump("ada") for _ in range(2)]
            await at.dump("bob")
            await at.run(60)
            assert at.writers() == {"ada": 4, "bob": 4}
            assert [dump_of(one.lease.id) for one in at.at.values() if one].count(first) == 3

    asyncio.run(scenario())


def test_all_help_the_dump_that_is_left(world):
    """Once the other one is complete its replicas are free, and none of them stays so."""

    async def scenario() -> None:
        async with world(4) as at:
            await at.dump("ada", slices=20)
            await at.dump("bob")
            await at.run(2)
            assert at.writers() == {"ada": 2, "bob": 2}
            await at.run(20 * SLICE)
            assert at.writers() == {"bob": 4}
            assert sum(times for (name, _), times in at.written.items() if at.users[name] == "ada") == 20

    asyncio.run(scenario())
