"""What people do with pools beside putting them: plan, resume, read logs, take all down, and collect what is left."""

from __future__ import annotations

import os
import secrets
import shlex
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnsight_hpc.daemon.replica_log import last_part, next_part
from nnsight_hpc.daemon.web import LAST_BYTE
from nnsight_hpc.slurm.batch.executor import JOB_VARIABLE
from nnsight_hpc.wire.errors import InvalidInput, NotFound, ReplicaFailed
from nnsight_hpc.wire.messages import decode, encode
from nnsight_hpc.wire.pools import Garbage, LogPart, Plan, PoolSpec, PoolStatus, Status
from nnsight_hpc.wire.states import EndCause, ReplicaState
from nnsight_hpc.wire.workers import EndRecord
from tests.daemon.process import HERE, LONG, DaemonProcess, Worker, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator


class Log(NamedTuple):
    pool: str
    replica: str
    path: Path


def _post(daemon: DaemonProcess, path: str, as_type: type, body: object = None, method: str = "POST"):
    return decode(daemon.people().call(method, path, body), as_type)


def _pools(daemon: DaemonProcess) -> list[str]:
    return [pool.spec.name for pool in daemon.people().get("/v1/status", Status).pools]


# -- plan --------------------------------------------------------------------------------------------------------------


def test_a_plan_submits_nothing_and_its_script_makes_a_worker_that_joins(daemon_with):
    """The script is the job's, the folder is complete: run by hand, its worker is the pool's replica."""
    daemon = daemon_with(poll=(1000.0, 1000.0), asked=1000.0)  # at a look it would be missed: no job of it runs
    plan = _post(daemon, "/v1/pools/by-hand/plan", Plan, {"model": "org/model", "dtype": "float16"})
    assert plan.spec == PoolSpec(name="by-hand", model="org/model", dtype="float16")
    folder = Path(plan.path).parent
    assert (folder.parent, (folder / "script").read_text()) == (daemon.places.replicas, plan.script)
    assert ("by-hand" in _pools(daemon), (folder / "log").exists()) == (False, False)
    worker = Worker(daemon, folder.name)
    assert worker.register().pool == plan.spec
    worker.report(ReplicaState.READY)
    joined = daemon.newest("by-hand")
    assert (joined.id, joined.state) == (folder.name, ReplicaState.READY)


def test_a_plan_that_is_refused_leaves_nothing(daemon):
    """What `up` would refuse, `plan` refuses with the same words."""
    before = set(daemon.places.replicas.iterdir())
    with pytest.raises(InvalidInput, match="asks for 2 nodes"):
        _post(daemon, "/v1/pools/wide/plan", Plan, {"model": "m", "nodes": 2, "tp": 2})
    with pytest.raises(InvalidInput, match="asks for 2 nodes"):
        daemon.up("wide", nodes=2, tp=2)
    assert set(daemon.places.replicas.iterdir()) == before


# -- resume ------------------------------------------------------------------------------------------------------------


def test_resume_tries_again_what_is_held(daemon_with):
    """A pool whose starts failed stays as it is; resumed, another replica is tried, and the pool is held anew."""
    daemon = daemon_with(job="failing_job", retry=0.05, starts=1)
    with suppress(ReplicaFailed):  # it may fail before `up` has to answer; so may `resume`
        daemon.up()
    wait_for(lambda: daemon.people().get("/v1/pools/smol", PoolStatus).held)
    before = daemon.newest().id
    with suppress(ReplicaFailed):
        _post(daemon, "/v1/pools/smol/resume", PoolStatus)
    assert wait_for(lambda: daemon.newest().id != before)
    assert wait_for(lambda: daemon.people().get("/v1/pools/smol", PoolStatus).held).kind == "ReplicaFailed"


# -- logs --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def log(daemon) -> Iterator[Log]:
    """The log of the only replica of a pool, which has been written to."""
    pool = f"logs-{secrets.token_hex(2)}"
    daemon.up(pool)
    replica = daemon.newest(pool)
    path = daemon.places.replica(replica.id) / "log"
    wait_for(lambda: path.exists() and "here I am" in path.read_text())
    yield Log(pool, replica.id, path)
    daemon.people().call("DELETE", f"/v1/pools/{pool}")


def test_a_log_is_read_from_its_end_and_followed(daemon, log):
    """The last lines say where to read on; what is written then comes within a second or two, in whole lines."""
    log.path.write_text("one\ntwo\nthree\nfo")
    part = daemon.people().get(f"/v1/pools/{log.pool}/log?lines=2", LogPart)
    assert part == LogPart(replica=log.replica, text="two\nthree\n", next=14)

    def write() -> None:
        time.sleep(0.3)
        with log.path.open("a") as file:
            file.write("ur\nfive\nsi")

    writing = threading.Thread(target=write)
    writing.start()
    more = daemon.people().get(f"/v1/pools/{log.pool}/log?replica={part.replica}&from={part.next}&wait={LONG}", LogPart)
    writing.join()
    assert (more.text, more.next, more.ended) == ("four\nfive\n", 24, False)


def test_a_followed_log_ends_with_its_replica(daemon, log):
    """What an ended replica wrote last comes without the end of its line, and then it is said that nothing follows."""
    worker = Worker(daemon, log.replica)
    worker.register()
    worker.post("/w1/end", EndRecord(replica=log.replica, cause=EndCause.CRASHED))
    log.path.write_text("all\nthe end")
    url = f"/v1/pools/{log.pool}/log?replica={log.replica}&wait=10&from="
    assert daemon.people().get(url + "0", LogPart) == LogPart(replica=log.replica, text="all\nthe end", next=11)
    assert daemon.people().get(url + "11", LogPart) == LogPart(replica=log.replica, text="", next=11, ended=True)
    last = daemon.people().get(f"/v1/pools/{log.pool}/log?replica={log.replica}&lines=1", LogPart)
    assert last == LogPart(replica=log.replica, text="the end", next=11, ended=True)


def test_the_log_of_a_pool_is_that_of_the_newest_replica_that_has_one(daemon, log):
    """One that has only been submitted has nothing to say yet; of another pool's replicas there is none here."""
    daemon.up(log.pool, replicas=2)
    newer = wait_for(lambda: daemon.newest(log.pool).id != log.replica and daemon.newest(log.pool))
    unwritten = daemon.places.replica(newer.id) / "log"
    wait_for(unwritten.exists)
    unwritten.unlink()
    assert daemon.people().get(f"/v1/pools/{log.pool}/log", LogPart).replica == log.replica
    daemon.up()
    with pytest.raises(NotFound, match="no replica"):
        daemon.people().get(f"/v1/pools/{log.pool}/log?replica={daemon.newest().id}", LogPart)


@given(st.lists(st.text("ab\n", max_size=6), max_size=12), st.integers(1, 5))
def test_a_log_read_in_parts_is_the_log(tmp_path_factory, pieces, lines):
    """However it grows, its parts are whole lines and together all of it; its last lines are those of the whole lines."""
    path = tmp_path_factory.mktemp("log") / "log"
    found, position = "", 0
    for piece in pieces:
        with path.open("a") as file:
            file.write(piece)
        text, position = next_part(path, position, None, ended=False)
        assert text in ("", *[text] * text.endswith("\n"))
        found += text
    rest, _ = next_part(path, position, None, ended=True)
    whole = "".join(pieces)
    assert found + rest == whole
    complete = whole[: whole.rfind("\n") + 1]
    expected = "".join(f"{line}\n" for line in complete.split("\n")[:-1][-lines:])
    assert last_part(path, lines, None, ended=False) == (expected, len(complete))


def test_a_log_is_read_on_from_a_place_that_no_file_has(tmp_path):
    """There is nothing, and one may go on asking."""
    (tmp_path / "log").write_text("all\n")
    assert next_part(tmp_path / "log", LAST_BYTE, None, ended=False) == ("", LAST_BYTE)


# -- all of it ---------------------------------------------------------------------------------------------------------


def _stray(daemon: DaemonProcess, replica: str) -> subprocess.Popen[bytes]:
    """The job of a replica of this home that the daemon does not know, once it runs."""
    worker = [
        sys.executable,
        str(HERE / "jobs" / "quiet_job.py"),
        "--home",
        str(daemon.places.home),
        "--replica",
        replica,
    ]
    job = subprocess.Popen(["setsid", "bash", "-c", f"export {JOB_VARIABLE}=$$; exec {shlex.join(worker)}"])
    wait_for(lambda: psutil.Process(job.pid).cmdline() == worker)
    return job


def test_down_all_ends_pools_and_jobs_that_no_pool_knows(daemon_with):
    """Also a job of ours whose state was lost: the executor itself knows it."""
    daemon = daemon_with()
    daemon.up("one")
    daemon.up("two")
    stray = _stray(daemon, "lost-1")
    garbage = _post(daemon, "/v1/pools", Garbage, method="DELETE")
    assert [job.partition(":")[0] for job in garbage.jobs] == [str(stray.pid)]
    assert stray.wait(120) != 0
    wait_for(lambda: not _pools(daemon))
    assert not psutil.pid_exists(stray.pid)


def test_garbage_is_collected_and_what_may_be_needed_stays(daemon_with):
    """Jobs of no pool that do not just end; old plans that nobody submitted; old replicas beyond the newest twenty.

    A dry run only says so.
    """
    daemon = daemon_with()
    daemon.up()
    replica, old = daemon.newest().id, time.time() - 8 * 86400
    spec = encode(PoolSpec(name="smol", model="org/model"))
    for number in range(22):
        folder = daemon.places.replica(f"smol-{number:08x}")
        folder.mkdir()
        (folder / "log").touch()
        os.utime(folder, (old + number, old + number))
    for name, moment in (("plan-1", old), ("plan-2", time.time()), ("smol-joins", old)):
        plan = daemon.places.replica(name)
        plan.mkdir()
        (plan / "job.json").write_bytes(spec)
        os.utime(plan, (moment, moment))
    ending = daemon.places.replica("lost-2")
    ending.mkdir()
    (ending / "end.json").touch()
    strays = [_stray(daemon, replica) for replica in ("lost-1", "smol-joins", "lost-2")]
    stray, joins = strays[:2]
    try:
        expected = {"plan-1", "smol-00000000", "smol-00000001"}
        for dry in (1, 0):
            garbage = _post(daemon, f"/v1/gc?dry={dry}", Garbage)
            assert {folder.rpartition("/")[2] for folder in garbage.folders} == expected
            assert [job.partition(":")[0] for job in garbage.jobs] == [str(stray.pid)]
            assert (stray.poll() is None) == (dry == 1) or wait_for(lambda: stray.poll() is not None)
        left = {folder.name for folder in daemon.places.replicas.iterdir()}
        assert left & expected == set()
        assert {replica, "plan-2", "smol-joins", "smol-00000002"} <= left
        assert joins.poll() is None
        assert _post(daemon, "/v1/gc", Garbage).folders == ()
    finally:
        for process in strays:
            process.kill()
            process.wait()
