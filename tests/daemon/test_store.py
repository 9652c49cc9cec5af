"""The database: one file an epoch, copied whole, migrated, checked; the smaller parts beside it."""

from __future__ import annotations

import asyncio
import signal
import sqlite3
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnsight_hpc.daemon import table
from nnsight_hpc.daemon.changes import Changes
from nnsight_hpc.daemon.database import connect, take_over
from nnsight_hpc.daemon.logs import last_lines
from nnsight_hpc.daemon.records import Pool, Replica, advance
from nnsight_hpc.daemon.schema import MIGRATIONS
from nnsight_hpc.daemon.store import Store
from nnsight_hpc.wire.errors import Conflict, CorruptData, HpcError, Incompatible, Unreachable
from nnsight_hpc.wire.messages import decode, encode
from nnsight_hpc.wire.places import places_at
from nnsight_hpc.wire.pools import PoolSpec, ReplicaStatus
from nnsight_hpc.wire.states import REPLICA_MOVES, ReplicaState


def _names(path):
    with sqlite3.connect(path) as connection:
        return [row[0] for row in connection.execute("SELECT name FROM pools ORDER BY name")]


def _insert(name):
    return lambda c: c.execute("INSERT INTO pools VALUES (?, X'')", (name,))


def test_each_epoch_has_its_own_copy(tmp_path):
    """What the next epoch writes does not touch the file of the one before, and only the newest few are kept."""
    places = places_at(tmp_path)
    for epoch in range(1, 6):
        connection = connect(take_over(places, epoch))
        _insert(f"p{epoch}")(connection)
        connection.close()
    assert _names(places.database(5)) == ["p1", "p2", "p3", "p4", "p5"]
    assert _names(places.database(4)) == ["p1", "p2", "p3", "p4"]
    assert sorted(p.name for p in tmp_path.glob("*.sqlite")) == [f"daemon-{epoch}.sqlite" for epoch in (3, 4, 5)]


def test_a_commit_that_was_cut_off_is_rolled_back_in_the_copy(tmp_path):
    """A process killed with a hot journal leaves a database that the next epoch reads as before that commit."""
    places = places_at(tmp_path)
    path = take_over(places, 1)
    program = (
        "import os, sqlite3, sys; from pathlib import Path; from nnsight_hpc.daemon.database import connect\n"
        "c = connect(Path(sys.argv[1])); c.execute('PRAGMA cache_size = 1'); c.execute('BEGIN')\n"
        "for i in range(300): c.execute('INSERT INTO pools VALUES (?, zeroblob(4000))', (str(i),))\n"
        "os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", program, path], check=False).returncode == -signal.SIGKILL
    journal = path.with_name(f"{path.name}-journal")
    assert journal.stat().st_size > 0
    assert path.stat().st_size > 100 * 4000  # much of the unfinished commit is in the file itself
    assert _names(take_over(places, 2)) == []


def test_a_newer_schema_and_a_damaged_file_are_refused(tmp_path):
    """Neither is guessed at: the first says which version is needed, the second names the file."""
    places = places_at(tmp_path)
    connection = connect(take_over(places, 1))
    connection.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    connection.close()
    with pytest.raises(Incompatible, match="newer version"):
        take_over(places, 2)
    places.database(1).write_bytes(b"SQLite format 3\0" + bytes(range(256)) * 40)
    with pytest.raises(CorruptData):
        take_over(places, 2)
    assert not places.database(2).exists()


def _home_of_version(places, version: int, *statements: tuple[str, tuple[object, ...]]):
    with sqlite3.connect(places.database(1)) as connection:
        for migration in MIGRATIONS[:version]:
            for statement in migration:
                connection.execute(statement)
        for statement, values in statements:
            connection.execute(statement, values)
        connection.execute(f"PRAGMA user_version = {version}")


def test_pools_of_an_earlier_version_are_taken_over(tmp_path):
    """What was so many tasks on each of so many nodes is their product in ranks."""
    places = places_at(tmp_path)
    body = encode(Pool(PoolSpec(name="p", model="m", nodes=2), desired=1)).replace(b'"tp":1', b'"tasks_per_node":3')
    _home_of_version(places, 1, ("INSERT INTO pools VALUES ('p', ?)", (body,)))
    with connect(take_over(places, 2)) as connection:
        [(found,)] = connection.execute("SELECT body FROM pools").fetchall()
    assert Pool(PoolSpec(name="p", model="m", nodes=2, tp=6), desired=1) == decode(found, Pool)


def test_a_home_without_stories_and_causes_is_taken_over(tmp_path):
    """Of which no replica was wanted goes down; ends in words become ends without a cause; requests need nothing known."""
    places, spec = places_at(tmp_path), PoolSpec(name="p", model="m")
    replica = Replica(ReplicaStatus(id="p-1", pool="p", state=ReplicaState.ENDED), spec)
    old_replica = encode(replica).replace(b'{"status"', b'{"cause":"failed: CUDA error","status"')
    columns = "id, kind, pool, state, user, times, fingerprint, dataset, dump"
    request = ("r-abcdefgh2345", "run", "p", "QUEUED", "u", '{"QUEUED":1.5}', "", "", b"")
    _home_of_version(
        places,
        2,
        *[("INSERT INTO pools VALUES (?, ?)", (str(wish), encode(Pool(spec, desired=wish)))) for wish in (0, 2)],
        ("INSERT INTO replicas VALUES ('p-1', ?)", (old_replica,)),
        (f"INSERT INTO requests ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", request),
    )
    with connect(take_over(places, 2)) as connection:
        pools = [decode(body, Pool) for (body,) in connection.execute("SELECT body FROM pools ORDER BY name")]
        [(body,)] = connection.execute("SELECT body FROM replicas").fetchall()
        row = table.get(connection, "r-abcdefgh2345")
    assert [Pool(spec, desired=0, down=True), Pool(spec, desired=2)] == pools
    assert replica == decode(body, Replica)
    assert (row.needs, row.kills, row.times) == (0.0, 0, {"QUEUED": 1.5})


def test_when_requests_ended_is_taken_over(tmp_path):
    """What was in the times only is a column of its own now; of what has not ended it is 0."""
    places, columns = places_at(tmp_path), "id, kind, pool, state, user, times, fingerprint, dataset, dump"
    rows = [
        ("r-1", "FAILED", '{"QUEUED":1.5,"FAILED":2.5}'),
        ("r-2", "COMPLETED", '{"COMPLETED":7.0}'),
        ("r-3", "QUEUED", '{"QUEUED":1.5}'),
    ]
    insert = f"INSERT INTO requests ({columns}) VALUES (?, 'run', 'p', ?, 'u', ?, '', '', X'')"
    _home_of_version(places, 4, *[(insert, row) for row in rows])
    with connect(take_over(places, 2)) as connection:
        found = [table.get(connection, name).ended for name, _, _ in rows]
        indices = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'index'")}
    assert found == [2.5, 7.0, 0.0]
    assert "requests_of_pool" not in indices


def test_work_is_committed_together_and_fails_alone(tmp_path):
    """Of many changes that come at once the one that raises is undone, and its error is its caller's only."""

    async def scenario():
        store = Store(take_over(places_at(tmp_path), 1), lambda: None)
        names = ["a", "b", "a", "c"]
        results = await asyncio.gather(*(store.run(_insert(name)) for name in names), return_exceptions=True)
        await store.close()
        return [isinstance(result, sqlite3.IntegrityError) for result in results]

    assert asyncio.run(scenario()) == [False, False, True, False]
    assert _names(places_at(tmp_path).database(1)) == ["a", "b", "c"]


def test_nothing_is_acknowledged_without_the_lease(tmp_path):
    """When the check after a commit fails, the caller gets its error instead of a result."""

    def lost():
        raise Unreachable("the lease is lost")

    async def scenario():
        store = Store(take_over(places_at(tmp_path), 1), lost)
        with pytest.raises(Unreachable):
            await store.run(_insert("a"))
        await store.close()

    asyncio.run(scenario())


def test_a_full_disk_is_said_and_survived(tmp_path):
    """A commit that SQLite cannot write becomes our own error, and the next one that fits is stored."""

    async def scenario():
        store = Store(take_over(places_at(tmp_path), 1), lambda: None)
        pages = await store.run(lambda c: c.execute("PRAGMA page_count").fetchone()[0])
        await store.run(lambda c: c.execute(f"PRAGMA max_page_count = {pages + 2}").fetchone())
        with pytest.raises((HpcError, sqlite3.OperationalError), match=r"full|cannot write"):
            await store.run(lambda c: c.execute("INSERT INTO pools VALUES ('big', zeroblob(100000))"))
        await store.run(_insert("small"))
        await store.close()

    asyncio.run(scenario())
    assert _names(places_at(tmp_path).database(1)) == ["small"]


def test_a_waiter_sees_every_change_and_gives_up_in_time():
    """A change between reading and waiting is not missed; without one the last value comes at the deadline."""

    async def scenario():
        changes, value = Changes(), 0

        async def read():
            await asyncio.sleep(0)
            return value

        waiting = asyncio.ensure_future(changes.wait("k", read, lambda v: v >= 2, 120))
        for _ in range(2):
            await asyncio.sleep(0.01)
            value += 1
            changes.announce("k")
        assert await waiting == 2
        assert await changes.wait("k", read, lambda v: v >= 3, 0.05) == 2
        closing = asyncio.ensure_future(changes.wait("k", read, lambda v: v >= 3, 120))
        await asyncio.sleep(0.01)
        changes.close()
        assert await asyncio.wait_for(closing, 60) == 2

    asyncio.run(scenario())


@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["Zl", "Zp", "Cc"])), max_size=50),
    st.integers(1, 60),
)
def test_the_last_lines_are_those_of_the_whole_file(tmp_path_factory, lines, count):
    """Read from behind, a log ends as it does when it is read as a whole."""
    path = tmp_path_factory.mktemp("log") / "log"
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    assert last_lines(path, count) == "\n".join(lines[-count:])


def test_the_last_lines_of_a_large_log_cross_blocks(tmp_path):
    """Lines longer than a block of reading come whole; a missing log has none."""
    (tmp_path / "log").write_text("first\n" + "x" * 200_000 + "\n" + "y" * 200_000 + "\n")
    assert last_lines(tmp_path / "log", 2) == "x" * 200_000 + "\n" + "y" * 200_000
    assert last_lines(tmp_path / "none", 2) == ""


@given(st.sampled_from(ReplicaState), st.sampled_from(ReplicaState))
def test_a_replica_advances_only_by_allowed_moves(current, to):
    """What a worker reports is reached through states that it may have passed unseen, or refused."""
    seen = {current}
    reachable = {current, *REPLICA_MOVES[current]}
    while seen != reachable:
        seen = set(reachable)
        for step in (ReplicaState.LOADING, ReplicaState.READY):
            if step in reachable:
                reachable |= REPLICA_MOVES[step]
    try:
        assert advance(current, to, of="replica x") == to
        assert to in reachable
    except Conflict:
        assert to == current or to not in REPLICA_MOVES[current]
