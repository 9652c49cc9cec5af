"""The daemon with 10,000 queued requests of 100 users for 50 pools, beside what SQLite and the disk take by themselves.

As root: the daemon is a real one, its users connect as users of their own, its workers are simulated and speak the real
protocol. Users send one after the other; between two requests the same rows are committed by hand to another database of
the same form on the same disk. A lease is what a worker waits for over its channel; the decision in it is timed in this
process, too, with the very rows. A restart is that of a killed daemon, from the start of its process to its first answer;
what it takes with an empty home is taken off, since that is Python and its imports, whatever is in the queue.
"""

from __future__ import annotations

import asyncio
import math
import shutil
import sqlite3
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from figures import Figure, main
from scale_crowd import MOST, Crowd, crowd

from nnsight_hpc.daemon import table
from nnsight_hpc.daemon.backlog import Backlog
from nnsight_hpc.daemon.changes import Changes
from nnsight_hpc.daemon.config import Config
from nnsight_hpc.daemon.database import connect, take_over
from nnsight_hpc.daemon.holdings import Holdings
from nnsight_hpc.daemon.pools import Pools
from nnsight_hpc.daemon.scheduler import Scheduler
from nnsight_hpc.daemon.store import Store
from nnsight_hpc.daemon.story import Stories
from nnsight_hpc.wire.names import new_request_id
from nnsight_hpc.wire.places import places_at
from tests.daemon.process import DaemonProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from nnsight_hpc.daemon.table import Row
    from nnsight_hpc.wire.http import HttpClient

USERS, POOLS, REQUESTS = 100, 50, 10_000
QUICK_POOLS, QUICK_REQUESTS = 10, 1000
FEW = 100
"""Queued requests with which a decision is compared."""
AT_ONCE, _EACH = 16, 25
"""Users who send at the same time, and how many requests each."""
_BARE_EVERY = 4
"""Requests between two commits by hand."""
_ROWS = (
    """INSERT INTO requests (id, kind, pool, state, user, times, fingerprint, dataset, dump, batch, tokens, digest)
        VALUES (?, 'run', 'p0', 'QUEUED', '60000', json_object('RECEIVED', 1.5, 'QUEUED', ?), '', '', X'', 'b', 4, ?)""",
    "INSERT INTO events (subject, time, text, replica) VALUES (?, ?, 'queued for pool p0 by 60000', '')",
)
_CONFIG = Config(executor="embedded", places=places_at(Path("/nowhere")))
_DECISIONS, _STARTS, _LEASES = 20, 5, 50
"""How often each is repeated."""


def measure(quick: bool) -> Iterator[Figure]:
    pools, requests = (QUICK_POOLS, QUICK_REQUESTS) if quick else (POOLS, REQUESTS)
    with crowd(USERS, pools) as many, tempfile.TemporaryDirectory() as folder:
        by_hand = connect(take_over(places_at(Path(folder)), 1))
        accepted, bare = _filled(many, FEW, by_hand)
        few = many.leased(_LEASES)
        rest = _filled(many, requests - FEW + _LEASES - AT_ONCE * _EACH, by_hand)
        by_hand.close()
        yield from _acceptance([*accepted, *rest[0]], [*bare, *rest[1]])
        yield from _accepted_at_once(many)
        yield from _leases(few, many.leased(_LEASES), requests)
        yield from _process(many)
        yield from _lists(many)
        many.daemon.kill()
        database = Path(shutil.copy(many.daemon.places.database(many.daemon.lease().epoch), folder))
        yield from _decisions(database)
        yield from _restarts(many.daemon, database)
        begun = time.perf_counter()
        yield Figure(
            "all leased, run and ended, requests/s", many.work() / (time.perf_counter() - begun), None, ">=", ""
        )


def _filled(many: Crowd, requests: int, by_hand: sqlite3.Connection) -> tuple[list[float], list[float]]:
    """Seconds that each request took, and each commit by hand in between."""
    accepted, bare = [], []
    for number in range(requests):
        user = many.users[number % len(many.users)]
        accepted.append(_seconds(lambda user=user: many.send(user)))
        if number % _BARE_EVERY == 0:
            bare.append(_seconds(lambda: _commit(by_hand)))
    return accepted, bare


def _commit(connection: sqlite3.Connection) -> None:
    """What is written of a request, and nothing else."""
    name = new_request_id()
    connection.execute("BEGIN")
    for statement, values in zip(_ROWS, ((name, time.time(), "0" * 64), (f"request:{name}", time.time())), strict=True):
        connection.execute(statement, values)
    connection.execute("COMMIT")


def _acceptance(accepted: list[float], bare: list[float]) -> Iterator[Figure]:
    for name, times in (("a request accepted", accepted), ("its rows by hand", bare)):
        yield Figure(f"{name}, median, ms", 1e3 * statistics.median(times), None, "<=", "")
        yield Figure(f"{name}, p99, ms", 1e3 * _p99(times), None, "<=", "")
    yield Figure("accepted / by hand, median", statistics.median(accepted) / statistics.median(bare), None, "<=", "")
    yield Figure("accepted / by hand, p99", _p99(accepted) / _p99(bare), 3.0, "<=", "its rows by hand")


def _accepted_at_once(many: Crowd) -> Iterator[Figure]:
    """Users who each send their next request when the last one was accepted, all the time."""

    def send(user: HttpClient) -> list[float]:
        return [_seconds(lambda: many.send(user)) for _ in range(_EACH)]

    begun = time.perf_counter()
    with ThreadPoolExecutor(AT_ONCE) as at_once:
        times = [one for each in at_once.map(send, many.users[:AT_ONCE]) for one in each]
    rate = len(times) / (time.perf_counter() - begun)
    yield Figure(f"{AT_ONCE} users at once, accepted/s", rate, None, ">=", "")
    yield Figure(f"{AT_ONCE} users at once, p99, ms", 1e3 * _p99(times), None, "<=", "")


def _leases(few: list[float], many: list[float], requests: int) -> Iterator[Figure]:
    yield Figure(f"a lease, {FEW} queued, median, ms", 1e3 * statistics.median(few), None, "<=", "")
    yield Figure(f"a lease, {requests} queued, median, ms", 1e3 * statistics.median(many), None, "<=", "")
    ratio = statistics.median(many) / statistics.median(few)
    yield Figure(f"a lease, {requests} / {FEW} queued", ratio, 2.0, "<=", f"{FEW} queued")


def _process(many: Crowd) -> Iterator[Figure]:
    yield Figure("resident memory of the daemon, MB", many.memory() / 1e6, 150.0, "<=", "")
    yield Figure("torch is loaded", float(many.maps_torch()), 0.0, "<=", "")


def _lists(many: Crowd) -> Iterator[Figure]:
    for who, client in (("owner", many.daemon.people()), ("user", many.users[0])):
        times = [_seconds(lambda client=client: client.call("GET", "/v1/status")) for _ in range(20)]
        yield Figure(f"status for the {who}, median, ms", 1e3 * statistics.median(times), None, "<=", "")


def _decisions(database: Path) -> Iterator[Figure]:
    """What goes next: as if all were for one pool, so that all users wait in both cases; and as it is."""
    rows, pools = asyncio.run(_loaded(database))
    in_one = [msgspec.structs.replace(row, pool="p0") for row in rows]
    for spread, of in (("one pool", in_one), (f"{len({row.pool for row in rows})} pools", rows)):
        few, many = (_decision(of[:count], pools, 1) for count in (FEW, len(of)))
        yield Figure(f"a decision over {spread}, {FEW} queued, us", 1e6 * few, None, "<=", "")
        yield Figure(f"a decision over {spread}, {len(of)} queued, us", 1e6 * many, None, "<=", "")
        yield Figure(f"a decision over {spread}, {len(of)} / {FEW}", many / few, 2.0, "<=", f"{FEW} queued")
        company = _decision(of, pools, MOST)
        yield Figure(f"with {MOST} to share a forward, {len(of)} queued, us", 1e6 * company, None, "<=", "")


async def _loaded(database: Path) -> tuple[list[Row], Pools]:
    """What is queued, and the pools with their replicas."""
    store = Store(database, lambda: None)
    try:
        pools = Pools(store, Changes(), _CONFIG, Stories(store))
        await pools.load()
        return await store.run(lambda c: table.select(c, "state = 'QUEUED'")), pools
    finally:
        await store.close()


def _decision(rows: Sequence[Row], pools: Pools, most: int) -> float:
    """Seconds that it takes to choose what a replica gets, the median over the pools for which something waits."""
    backlog = Backlog()
    for row in rows:
        backlog.note(row)
    scheduler, times = Scheduler(backlog, Holdings(), pools, _CONFIG), []
    for _ in range(_DECISIONS):
        for pool in backlog.pools():
            replica = pools.of(pool)[-1].id
            times.append(_seconds(lambda pool=pool, replica=replica: scheduler.next(pool, replica, most, math.inf)))
    return statistics.median(times)


def _restarts(daemon: DaemonProcess, database: Path) -> Iterator[Figure]:
    with tempfile.TemporaryDirectory(prefix="nnh-") as folder, DaemonProcess(Path(folder)) as empty:
        times = [(_started(empty), _started(daemon), _seconds(lambda: _read(database))) for _ in range(_STARTS)]
    without, full, reading = map(statistics.median, zip(*times, strict=True))
    yield Figure("restart with an empty home, s", without, None, "<=", "")
    yield Figure("restart with the full queue, s", full, None, "<=", "")
    yield Figure("reading the database once, s", reading, None, "<=", "")
    yield Figure("what the queue adds to a restart / reading", (full - without) / reading, 5.0, "<=", "reading")


def _started(daemon: DaemonProcess) -> float:
    if daemon.process is not None and daemon.process.poll() is None:
        daemon.kill()
    return _seconds(daemon.start)


def _read(database: Path) -> None:
    """Every row of every table, as Python has them."""
    connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
    tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    for (name,) in tables:
        connection.execute(f"SELECT * FROM {name}").fetchall()
    connection.close()


def _seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _p99(times: Sequence[float]) -> float:
    return sorted(times)[int(0.99 * len(times))]


if __name__ == "__main__":
    main(measure, __doc__)
