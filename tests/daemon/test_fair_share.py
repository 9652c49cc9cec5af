"""Who gets the workers: simulated hours of many users, and two users whose requests go through the real queue."""

from __future__ import annotations

import asyncio
import time

import pytest

from nnsight_hpc.daemon import table
from nnsight_hpc.daemon.backlog import Backlog
from nnsight_hpc.daemon.changes import Changes
from nnsight_hpc.daemon.config import Config
from nnsight_hpc.daemon.database import take_over
from nnsight_hpc.daemon.holdings import Holdings
from nnsight_hpc.daemon.new_request import NewRequest
from nnsight_hpc.daemon.pools import Pools
from nnsight_hpc.daemon.requests import Requests
from nnsight_hpc.daemon.roster import Roster
from nnsight_hpc.daemon.scheduler import Scheduler
from nnsight_hpc.daemon.shares import Usage
from nnsight_hpc.daemon.store import Store
from nnsight_hpc.daemon.story import Stories
from nnsight_hpc.daemon.table import Row
from nnsight_hpc.wire.names import new_request_id
from nnsight_hpc.wire.places import places_at
from nnsight_hpc.wire.pools import PoolSpec
from nnsight_hpc.wire.states import RequestState
from nnsight_hpc.wire.workers import Begun, Outcome
from tests.daemon.known import pool, replica
from tests.daemon.steps import calls

LONG = 5.0
"""Seconds that a batch of a simulated dump takes."""


class Simulated:
    """One simulated replica ``p-1`` of a pool ``p``, whose clock is all that passes."""

    def __init__(self, tmp_path, monkeypatch) -> None:
        self.now, self.config = 1e9, Config(executor="slurm", places=places_at(tmp_path))
        monkeypatch.setattr(time, "time", lambda: self.now)
        self.backlog, self.holdings = Backlog(), Holdings()
        self.roster = Roster(self.config)
        self.scheduler = Scheduler(self.backlog, self.holdings, self.roster, self.config)
        self.had: dict[str, float] = {}
        self.waited: dict[str, list[float]] = {}
        self._sequence = 0

    def serving(self, *replicas: str) -> None:
        """The pool has these replicas, which serve."""
        self.roster._pools["p"] = pool(len(replicas))
        self.roster._replicas = {name: replica(name) for name in replicas}

    def send(self, user: str, *, kind: str = "run", count: int = 1, **fields) -> None:
        for _ in range(count):
            self._sequence += 1
            self._note(self._row(user, kind, RequestState.QUEUED, self._sequence, **fields))

    def _row(self, user, kind, state, sequence, **fields) -> Row:
        empty = {**dict.fromkeys(Row.__struct_fields__), "needs": 0.0, "priority": 0, "batch": "", "tokens": 1}
        known = {"sequence": sequence, "id": f"r-{sequence}", "kind": kind, "pool": "p", "user": user, "replica": "p-1"}
        return Row(**{**empty, **known, "state": state, "times": {state: self.now}, **fields})

    def _note(self, row: Row) -> None:
        self.backlog.note(row)

    def step(self, seconds: float, most: int = 1) -> list[str]:
        """Give the replica what goes next, let it run, a dump for one batch; whose that was."""
        chosen = self.scheduler.next("p", "p-1", most, 1e9)
        for one in chosen:
            held = self._row(one.user, one.kind, RequestState.RUNNING, one.sequence)
            self._note(held)
            self.holdings.take(held, share=1 / len(chosen))
            self.waited.setdefault(one.user, []).append(self.now - one.since)
        dump = bool(chosen) and chosen[0].kind == "dump"
        self.now += LONG if dump else seconds
        while dump and not self._yields(chosen[0]):
            self.now += LONG
        for one in chosen:
            self._end(one, (LONG if dump else seconds) / len(chosen) if not dump else self.now - self._began(one))
        if dump:
            self.send(chosen[0].user, kind="dump")
        return [one.user for one in chosen]

    def _began(self, one) -> float:
        return self.holdings.find(one.id).since

    def _yields(self, one) -> bool:
        """Whether a run waits that the dump gives way to."""
        order, queue = self.scheduler._order("p"), self.backlog.queue("p")
        run = next(queue.runs.in_order(order), None)
        return run is None or self.scheduler._yields(self.holdings.find(one.id), run, order)

    def _end(self, one, seconds: float) -> None:
        self._note(self._row(one.user, one.kind, RequestState.COMPLETED, one.sequence))
        self.holdings.drop(one.id)
        used = self.scheduler.usage.get(one.user, Usage()).at(self.now, self.config.half_life)
        self.scheduler.usage[one.user] = Usage(used + seconds, self.now)
        self.had[one.user] = self.had.get(one.user, 0.0) + seconds
        if one.kind == "run":
            self.scheduler.ran("p", seconds)


@pytest.fixture
def simulated(tmp_path, monkeypatch) -> Simulated:
    return Simulated(tmp_path, monkeypatch)


def test_users_who_always_wait_get_equal_parts(simulated):
    """However many requests each has, and however long they are; within one request of each."""
    lengths = {"ada": 1.0, "bob": 10.0, "cyd": 3.0}
    for user in lengths:
        simulated.send(user, count={"ada": 2000, "bob": 200, "cyd": 600}[user])
    user = "ada"
    while simulated.now < 1e9 + 900:
        order = simulated.scheduler._order("p")
        user = next(simulated.backlog.queue("p").runs.in_order(order)).user
        assert simulated.step(lengths[user]) == [user]
    assert max(simulated.had.values()) - min(simulated.had.values()) <= 2 * max(lengths.values())


def test_who_comes_with_one_request_waits_for_what_runs_only(simulated):
    """One has 1,000 queued, and has had the workers for an hour; each time another comes he is next."""
    simulated.send("bulk", count=1000)
    for _ in range(30):
        simulated.step(30.0)
        simulated.send("guest")
        assert simulated.step(1.0) == ["guest"]
    assert max(simulated.waited["guest"]) == 0.0


def test_what_was_had_long_ago_is_forgotten(simulated):
    """After eight half-lives an hour counts as seconds do; who had those just now comes second."""
    long_ago = simulated.now - 8 * simulated.config.half_life
    simulated.scheduler.usage = {"ada": Usage(3600.0, long_ago), "bob": Usage(60.0, simulated.now)}
    simulated.send("bob")
    simulated.send("ada")
    assert [simulated.step(1.0), simulated.step(1.0)] == [["ada"], ["bob"]]


def test_a_dump_and_runs_take_turns(simulated):
    """Runs never wait longer than a dump's turn and one batch; the dump of one who has had less gets its part."""
    simulated.scheduler.usage = {"runs": Usage(1e6, simulated.now)}
    simulated.send("dump", kind="dump")
    began, users = simulated.now, []
    while simulated.now < began + 300:
        if not len(simulated.backlog.queue("p").runs):
            simulated.send("runs")
        users += simulated.step(1.0)
    assert max(simulated.waited["runs"]) <= simulated.config.turn + LONG
    assert 0.3 < simulated.had["dump"] / (simulated.had["dump"] + simulated.had["runs"]) < 0.7


def test_runs_of_who_has_had_less_go_before_a_dump_at_once(simulated):
    """A dump runs while nothing else waits, and ends its batch when something does."""
    simulated.scheduler.usage = {"dump": Usage(100.0, simulated.now)}
    simulated.send("dump", kind="dump")
    simulated.step(1.0)
    simulated.send("runs", count=3)
    assert [simulated.step(1.0) for _ in range(4)] == [["runs"], ["runs"], ["runs"], ["dump"]]


def test_a_batch_is_shared_by_all_who_fit_it(simulated):
    """Users take places in a forward as they would take turns, up to the number and the tokens that there is room for."""
    simulated.send("ada", count=20, batch="x", tokens=10)
    simulated.send("bob", count=2, batch="x", tokens=10)
    simulated.send("cyd", batch="y", tokens=10)
    assert sorted(simulated.step(1.0, most=4)) == ["ada", "ada", "bob", "bob"]
    chosen = simulated.scheduler.next("p", "p-1", 100, 35)
    assert [one.user for one in chosen] == ["cyd"]
    simulated.step(1.0)
    assert len(simulated.scheduler.next("p", "p-1", 100, 35)) == 3


def test_free_replicas_share_a_batch(simulated):
    """None takes all of it while another one has nothing to do."""
    simulated.send("ada", count=9, batch="x")
    simulated.serving("p-1", "p-2")
    assert len(simulated.scheduler.next("p", "p-1", 64, 1e9)) == 5
    simulated.holdings.take(simulated._row("ada", "run", RequestState.RUNNING, 99, replica="p-2"))
    assert len(simulated.scheduler.next("p", "p-1", 64, 1e9)) == 9


def test_who_has_as_many_replicas_as_he_may_waits(simulated):
    """His requests stay where they are; others go."""
    object.__setattr__(simulated.config, "running_per_user", 1)
    simulated.send("ada", count=2)
    simulated.send("bob")
    simulated.holdings.take(simulated._row("ada", "run", RequestState.RUNNING, 99, replica="p-2"))
    assert simulated.scheduler.is_barred("ada")
    assert [simulated.step(1.0), simulated.step(1.0)] == [["bob"], []]
    alone = {one.id: simulated.scheduler.position("p", one.id) for one in simulated.backlog.queue("p").of("ada")}
    assert sorted(alone.values()) == [0, 1]
    assert alone == simulated.scheduler.positions("p", alone)
    simulated.holdings.drop("r-99")
    assert simulated.step(1.0) == ["ada"]


def test_a_decision_does_not_grow_with_the_queue(simulated):
    """At 10,000 queued requests of 100 users it takes at most twice the steps that it takes at 100; so does a position."""

    def steps() -> tuple[int, int]:
        [chosen] = simulated.scheduler.next("p", "p-1", 1, 1e9)
        decision = calls(lambda: simulated.scheduler.next("p", "p-1", 1, 1e9))
        return decision, calls(lambda: simulated.scheduler.position("p", chosen.id))

    for user in range(100):
        simulated.send(f"user-{user}")
    few = steps()
    for _ in range(99):
        for user in range(100):
            simulated.send(f"user-{user}")
    assert all(many <= 2 * before for many, before in zip(steps(), few, strict=True))


def test_among_a_thousand_of_another_one_request_is_next(tmp_path):
    """Through the real queue and its database: it waits for the batch that runs; what was had outlives a restart."""
    places = places_at(tmp_path)
    places.requests.mkdir()
    config = Config(executor="slurm", places=places)

    async def scenario() -> None:
        store, changes = Store(take_over(places, 1), lambda: None), Changes()
        try:
            pools = Pools(store, changes, config, Stories(store))
            requests = Requests(store, changes, pools, config)
            await pools.put(PoolSpec(name="p", model="m"))
            await asyncio.gather(*(_send(requests, "bulk") for _ in range(1000)))
            running = await requests.lease("p", "p-1", 16)
            assert len(running) == 16
            guest = await _send(requests, "guest")
            assert requests.scheduler.position("p", guest) == 0
            await requests.starts.started("p-1", [Begun(id=one.id, attempt=1) for one in running])
            await requests.outcomes("p-1", [Outcome(id=one.id, attempt=1, seconds=0.1) for one in running])
            assert [lease.id for lease in await requests.lease("p", "p-1")] == [guest]
            again = Requests(store, changes, pools, config)
            await again.load()
            assert again.scheduler.usage["bulk"].seconds == pytest.approx(1.6, rel=1e-3)
            assert [one.user for one in await store.run(lambda c: table.select(c, "state = 'LEASED'"))] == ["guest"]
        finally:
            await store.close()

    asyncio.run(scenario())


async def _send(requests: Requests, user: str) -> str:
    name = new_request_id()
    new = NewRequest(id=name, kind="run", pool="p", user=user, received=time.time(), batch="x", tokens=4)
    await requests.accept(new)
    return name
