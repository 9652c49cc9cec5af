"""What the daemon does for each request, in each turn and for whoever watches: as much with a full queue as with a small one.

Requests of 100 users wait for 50 pools. With 100 of them two users wait for each pool; with 10,000 nearly all do.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, NamedTuple

import pytest

from nnsight_hpc.daemon.changes import Changes
from nnsight_hpc.daemon.config import Config
from nnsight_hpc.daemon.database import take_over
from nnsight_hpc.daemon.decisions import decide
from nnsight_hpc.daemon.metrics import _of_queue
from nnsight_hpc.daemon.new_request import NewRequest
from nnsight_hpc.daemon.pools import Pools
from nnsight_hpc.daemon.request_views import RequestViews
from nnsight_hpc.daemon.requests import Requests
from nnsight_hpc.daemon.store import Store
from nnsight_hpc.daemon.story import Stories
from nnsight_hpc.daemon.table import Row
from nnsight_hpc.wire.names import new_request_id
from nnsight_hpc.wire.places import places_at
from nnsight_hpc.wire.pools import PoolSpec
from nnsight_hpc.wire.states import RequestState
from nnsight_hpc.wire.workers import Begun, Outcome
from tests.daemon.known import replica
from tests.daemon.steps import counted

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import AsyncIterator, Awaitable, Callable

    from tests.daemon.steps import Steps

USERS, POOLS, FEW, MANY = 100, 50, 100, 10_000
_LONG = 7200.0


class Daemon(NamedTuple):
    """Its queue, in a process of ours."""

    connection: sqlite3.Connection
    pools: Pools
    requests: Requests
    views: RequestViews


def _fill(connection: sqlite3.Connection, queued: int) -> None:
    """Requests of one user after the other; each user has them in all pools. Some need two hours, in one pool all do."""
    rows = []
    for number in range(queued):
        user, pool = number % USERS, (number + number // USERS) % POOLS
        needs = _LONG if pool == 4 or number // USERS % 4 == 3 else 0.0
        rows.append((f"r-{number:012d}", f"p{pool}", f"user-{user}", time.time() - MANY + number, needs))
    connection.executemany(
        """INSERT INTO requests (id, kind, pool, state, user, times, fingerprint, dataset, dump, needs)
            VALUES (?, 'run', ?, 'QUEUED', ?, json_object('QUEUED', ?), '', '', X'', ?)""",
        rows,
    )


@asynccontextmanager
async def _daemon(folder, queued: int) -> AsyncIterator[Daemon]:
    """A daemon that has just started with so many requests in its queue."""
    places = places_at(folder)
    places.requests.mkdir(parents=True)
    config = Config(executor="slurm", places=places)
    store, changes = Store(take_over(places, 1), lambda: None), Changes()
    try:
        stories = Stories(store)
        pools = Pools(store, changes, config, stories)
        await asyncio.gather(*(pools.put(PoolSpec(name=f"p{number}", model="m")) for number in range(POOLS)))
        await store.run(lambda c: _fill(c, queued))
        requests = Requests(store, changes, pools, config)
        await requests.load()
        pools._replicas["p5-1"] = replica("p5-1", of=pools.get("p5"))
        requests.holdings.take(DUMP)
        connection = await store.run(lambda c: c)
        yield Daemon(connection, pools, requests, RequestViews(store, changes, pools, requests, stories))
    finally:
        await store.close()


async def _arrival(daemon: Daemon) -> None:
    new = NewRequest(id=new_request_id(), kind="run", pool="p1", user="user-1", received=time.time())
    await (await daemon.requests.accept(new)).durable


async def _start_and_end(daemon: Daemon) -> None:
    """One request is given to a worker, runs and ends."""
    [lease] = await daemon.requests.lease("p2", "p2-1")
    await daemon.requests.starts.started("p2-1", [Begun(id=lease.id, attempt=1)])
    await daemon.requests.outcomes("p2-1", [Outcome(id=lease.id, attempt=1, seconds=1.0)])


async def _decision(daemon: Daemon) -> None:
    daemon.requests.scheduler.next("p3", "p3-1", 1, 1e9)


async def _orders(daemon: Daemon) -> None:
    """Whether a replica is to interrupt its dump for something that waits."""
    assert daemon.requests.scheduler.gives_way("p5-1") == (DUMP.id,)


async def _nothing_fits(daemon: Daemon) -> None:
    """A decision for a replica whose walltime ends before anything of the pool could."""
    assert daemon.requests.scheduler.next("p4", "p4-1", 1, 1e9) == []


async def _turn(daemon: Daemon) -> None:
    """What a turn of the reconciler asks and decides."""
    for pool in daemon.pools.all():
        name = pool.spec.name
        demand, heard = daemon.requests.demand(name), daemon.pools.heard
        decide(pool, daemon.pools.replicas(name), demand, heard, now=time.time(), config=daemon.requests._config)


async def _expiry(daemon: Daemon) -> None:
    await daemon.requests.expire()


async def _metrics(daemon: Daemon) -> None:
    [*_of_queue(daemon.requests, daemon.pools.names())]


async def _overview(daemon: Daemon) -> None:
    """What the owner's dashboard shows."""
    await daemon.views.overview(None, 20)
    daemon.requests.scheduler.waiting()


DUMP = Row(
    **{
        **dict.fromkeys(Row.__struct_fields__),
        "id": "r-dump",
        "kind": "dump",
        "pool": "p5",
        "user": "user-5",
        "replica": "p5-1",
        "state": RequestState.RUNNING,
        "times": {RequestState.RUNNING: 0.0},
    }
)
WORK = [_arrival, _start_and_end, _decision, _orders, _nothing_fits, _turn, _expiry, _metrics, _overview]


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> dict[str, list[Steps]]:
    """Of each work: those with a few queued, and those with many."""

    async def measure(folder, queued: int) -> dict[str, Steps]:
        async with _daemon(folder, queued) as daemon:
            daemon.pools.left = lambda replica: 60.0 if replica == "p4-1" else 1e9
            return {work.__name__: await _counted(daemon, work) for work in WORK}

    few, many = (asyncio.run(measure(tmp_path_factory.mktemp("d"), queued)) for queued in (FEW, MANY))
    return {name: [few[name], many[name]] for name in few}


async def _counted(daemon: Daemon, work: Callable[[Daemon], Awaitable[None]]) -> Steps:
    await work(daemon)  # what is made once is made
    with counted(daemon.connection) as steps:
        await work(daemon)
    return steps


@pytest.mark.parametrize("work", [one.__name__ for one in WORK])
def test_work_does_not_grow_with_the_queue(steps, work):
    """With 10,000 queued requests it takes at most twice the steps, of Python and of SQLite, that it takes with 100."""
    few, many = steps[work]
    assert many.calls <= 2 * few.calls
    assert many.instructions <= 2 * few.instructions
