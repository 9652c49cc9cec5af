"""What happens before it is on disk: work goes on, nobody is told, and a daemon that ends then harms nothing."""

from __future__ import annotations

import asyncio
import threading
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from nnsight_hpc.daemon import ahead
from nnsight_hpc.daemon import store as daemon_store
from nnsight_hpc.daemon.backlog import Demand
from nnsight_hpc.daemon.changes import Changes
from nnsight_hpc.daemon.config import Config
from nnsight_hpc.daemon.database import take_over
from nnsight_hpc.daemon.new_request import NewRequest
from nnsight_hpc.daemon.pools import Pools
from nnsight_hpc.daemon.request_views import RequestViews
from nnsight_hpc.daemon.requests import Requests
from nnsight_hpc.daemon.store import Store
from nnsight_hpc.daemon.story import Stories
from nnsight_hpc.wire.errors import Conflict, HpcError, NotFound, Unreachable
from nnsight_hpc.wire.names import new_request_id
from nnsight_hpc.wire.places import places_at
from nnsight_hpc.wire.pools import PoolSpec
from nnsight_hpc.wire.states import RequestState
from nnsight_hpc.wire.workers import Lease, Outcome

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

LIMIT = 120


class Disk:
    """The check after each commit, which may be made to wait, or to fail."""

    def __init__(self) -> None:
        self.free = threading.Event()
        self.free.set()
        self.broken = False

    def check(self) -> None:
        assert self.free.wait(LIMIT)
        if self.broken:
            raise Unreachable("the lease may be lost")


class Queue:
    """The requests of a pool ``p`` over a database."""

    def __init__(self, store: Store, config: Config) -> None:
        self.store, self.changes, stories = store, Changes(), Stories(store)
        self.pools = Pools(store, self.changes, config, stories)
        self.requests = Requests(store, self.changes, self.pools, config)
        self.views = RequestViews(store, self.changes, self.pools, self.requests, stories)

    async def accept(self, name: str):
        new = NewRequest(id=name, kind="run", pool="p", user="u", received=1.0, frame=b"the frame")
        return await self.requests.accept(new, waits=False)

    async def lease(self, replica: str) -> Lease:
        [lease] = await self.requests.lease("p", replica)
        return lease

    async def end(self, replica: str, lease: Lease, result: bytes = b"the result"):
        [refused] = await self.requests.outcomes(replica, [_outcome(lease, result)])
        return refused and refused.kind


def _outcome(lease: Lease, result: bytes) -> Outcome:
    return Outcome(id=lease.id, attempt=lease.attempt, result=result, result_bytes=len(result))


@asynccontextmanager
async def opened(places, epoch: int, disk: Disk) -> AsyncIterator[Queue]:
    places.requests.mkdir(exist_ok=True)
    store = Store(take_over(places, epoch), disk.check)
    queue = Queue(store, Config(executor="slurm", places=places))
    try:
        await queue.pools.load()
        await queue.requests.load()
        if epoch == 1:
            await queue.pools.put(PoolSpec(name="p", model="m"))
        yield queue
    finally:
        disk.free.set()
        await store.close()


@pytest.fixture(autouse=True)
def _nothing_is_written_unless_somebody_waits(monkeypatch):
    monkeypatch.setattr(daemon_store, "_MOMENT", float(LIMIT))
    monkeypatch.setattr(ahead, "_AGAIN", 0.01)


def test_a_result_is_told_before_and_its_worker_is_released_after_the_disk(tmp_path):
    """Received, given away and ended without a commit; then the row, its end and its result come in one."""

    async def scenario() -> None:
        disk, name = Disk(), new_request_id()
        async with opened(places_at(tmp_path), 1, disk) as queue:
            accepted = await queue.accept(name)
            news = queue.views.news(name)
            lease = await queue.lease("p-1")
            assert (lease.id, lease.frame, accepted.durable.done()) == (name, b"the frame", False)
            disk.free.clear()
            ending = asyncio.ensure_future(queue.end("p-1", lease))
            await asyncio.wait_for(news.wait(), LIMIT)
            fresh = queue.requests.fresh(name)
            assert (fresh.row.state, fresh.result) == (RequestState.COMPLETED, b"the result")
            assert not ending.done()
            assert not accepted.durable.done()
            disk.free.set()
            assert await ending is None
            assert (await accepted.durable).id == name
            assert queue.requests.fresh(name) is None
            log, result = await queue.views.answer(name)
            assert (log.status.state, result) == (RequestState.COMPLETED, b"the result")

    asyncio.run(scenario())


def test_a_commit_that_may_be_in_vain_is_told_to_nobody(tmp_path):
    """Where the lease may be lost by then, the sender hears that; what is in memory is what is on disk."""

    async def scenario() -> None:
        disk, name = Disk(), new_request_id()
        async with opened(places_at(tmp_path), 1, disk) as queue:
            accepted = await queue.accept(name)
            lease = await queue.lease("p-1")
            disk.broken = True
            with pytest.raises(Unreachable):
                await queue.views.row(name)
            with pytest.raises(Unreachable):
                await accepted.durable
            disk.broken = False
            assert (await queue.views.row(name)).state == RequestState.LEASED
            assert await queue.end("p-1", lease) is None

    asyncio.run(scenario())


def test_a_request_that_was_rolled_back_is_taken_from_its_worker(tmp_path):
    """The database refuses the transaction: the queue forgets it, and an outcome of it is no outcome."""

    def refuse(connection):
        connection.execute("SELECT * FROM no_such_table")  # an OperationalError, as a full disk gives

    async def scenario() -> None:
        name = new_request_id()
        async with opened(places_at(tmp_path), 1, Disk()) as queue:
            accepted = await queue.accept(name)
            lease, told = await queue.lease("p-1"), queue.changes.event("orders:p-1")
            with pytest.raises(HpcError, match="cannot write its database"):
                await queue.store.run(refuse)
            with pytest.raises(HpcError, match="cannot write its database"):
                await accepted.durable
            await asyncio.wait_for(told.wait(), LIMIT)
            assert queue.requests.holdings.cancelled("p-1") == (name,)
            assert queue.requests.demand("p") == Demand()
            with pytest.raises(NotFound):
                await queue.views.row(name)
            assert await queue.end("p-1", lease) == "NotFound"
            assert queue.requests.held_by("p-1") == []
            again = await queue.accept(name)
            assert (await queue.lease("p-2")).attempt == 1
            assert not again.durable.done()

    asyncio.run(scenario())


def test_a_lease_that_its_daemon_did_not_write_down_counts_for_nothing(tmp_path):
    """The next daemon gives the same attempt to another worker; what the first says of it is refused, and it writes no file."""

    async def scenario() -> None:
        places, name = places_at(tmp_path), new_request_id()
        async with opened(places, 1, Disk()) as first:
            accepted = await first.accept(name)
            await first.views.row(name)
            assert accepted.durable.done()
            lost = await first.lease("p-1")
            async with opened(places, 2, Disk()) as second:  # as after a kill: what was not committed is not copied
                lease = await second.lease("p-2")
                assert (lease.id, lease.attempt, lease.result) == (name, lost.attempt, lost.result)
                with pytest.raises(Conflict):
                    await second.requests.confirm("p-1", name, lost.attempt)
                assert await second.end("p-1", lost, b"of the first") == "Conflict"
                await second.requests.confirm("p-2", name, lease.attempt)
                assert await second.end("p-2", lease, b"of the second") is None
                assert await second.end("p-1", lost, b"of the first") == "Conflict"
                assert (await second.views.answer(name))[1] == b"of the second"

    asyncio.run(scenario())


def test_a_small_result_goes_to_a_file_when_it_is_old(tmp_path):
    """From the database, which the next daemon copies; it is the same bytes then, also where it was asked for before."""

    async def scenario() -> None:
        names = [new_request_id() for _ in range(3)]
        async with opened(places_at(tmp_path), 1, Disk()) as queue:
            for name in names:
                await queue.accept(name)
                await queue.end("p-1", await queue.lease("p-1"), name.encode())
            rows = [await queue.views.row(name) for name in names]
            files = [queue.requests.files.result(row.id, row.attempt) for row in rows]
            assert await queue.requests.results.in_file(rows[0]) == files[0]
            assert [file.exists() for file in files] == [True, False, False]
            await queue.requests.results.settle(rows[1].ended + 1e-6)
            assert [file.exists() for file in files] == [True, True, False]
            for name in names:
                assert (await queue.views.answer(name))[1] == name.encode()

    asyncio.run(scenario())
