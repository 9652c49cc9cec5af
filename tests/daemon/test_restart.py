"""What was acknowledged survives the daemon, however it ends."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from nnsight_hpc.wire.errors import HpcError, Unreachable
from nnsight_hpc.wire.messages import RequestStatus
from nnsight_hpc.wire.names import new_request_id
from nnsight_hpc.wire.pools import PoolStatus, Status
from nnsight_hpc.wire.states import ReplicaState, RequestState
from tests.daemon.process import run_frame, send, wait_for
from tests.daemon.traffic import Traffic, check
from tests.rest import shares_at_rest


def test_a_request_is_on_disk_before_it_is_acknowledged(daemon_with):
    """Killed right after the answer, the daemon that follows has the request, its bytes and its place."""
    daemon = daemon_with()
    daemon.up()
    ids = [new_request_id() for _ in range(3)]
    for name in ids:
        send(daemon.people(), name)
    daemon.kill()
    requests = daemon.start().people().get("/v1/status", Status).requests
    assert [(r.id, r.state, r.position) for r in requests] == [(n, RequestState.QUEUED, i) for i, n in enumerate(ids)]
    assert daemon.worker().lease().frame == run_frame()


@pytest.mark.slow
@pytest.mark.parametrize("kills", [20, pytest.param(200, marks=[pytest.mark.long, pytest.mark.timeout(3000)])])
def test_nothing_acknowledged_is_lost_or_done_twice_by_kills_at_random_moments(daemon_with, kills):
    """Clients send, cancel and wait, two workers finish, and the daemon is killed while it serves or while it starts."""
    seed = int(os.environ.get("NNSIGHT_HPC_TEST_SEED", time.time_ns() % 2**32))
    print(f"NNSIGHT_HPC_TEST_SEED={seed}")
    moments = random.Random(seed)
    daemon = daemon_with(silence=5.0)
    with Traffic(daemon, seed) as traffic:
        for number in range(kills):
            time.sleep(moments.random() * 0.4)
            if number % 2:  # while a worker holds something
                wait_for(lambda: any(traffic.held.values()))
            daemon.kill()
            if moments.random() < 0.2:
                daemon.process = daemon.spawn()
                time.sleep(moments.random())
                daemon.kill()
            daemon.start()
        wait_for(lambda: len(traffic.acknowledged) > kills and traffic.answers)
        check(traffic, daemon.people())
    told = f"{len(traffic.acknowledged)} acknowledged, {len(traffic.answers)} answered"
    print(f"{told}, {len(traffic.cancelled)} cancelled")


def test_replicas_outlive_the_daemon_and_their_results_arrive(daemon_with):
    """What ran when the daemon was killed is finished by its worker, and what waited is leased by the next daemon."""
    daemon = daemon_with()
    daemon.up()
    worker = daemon.worker()
    running, waiting = new_request_id(), new_request_id()
    send(daemon.people(), running)
    send(daemon.people(), waiting)
    lease = worker.lease()
    worker.started(lease)
    job = psutil.Process(int(daemon.people().get("/v1/pools/smol", PoolStatus).replicas[0].job_id.split(":")[0]))
    daemon.kill()
    half = Path(f"{lease.result}.1234.partial")
    half.write_bytes(b"result")
    daemon.start()
    half.rename(lease.result)  # the worker was writing it while no daemon was there
    with pytest.raises(Unreachable):
        worker.report(ReplicaState.BUSY)
    worker.reconnect()
    worker.report(ReplicaState.BUSY, running=(running,))
    worker.finish(lease)
    assert daemon.people().call("GET", f"/v1/requests/{running}/result") == b"result"
    assert worker.lease().id == waiting
    assert job.is_running()
    assert [r.id for r in daemon.people().get("/v1/pools/smol", PoolStatus).replicas] == [worker.replica]


def test_a_request_whose_worker_is_silent_is_queued_again(daemon_with):
    """After the configured silence another lease has the next attempt, and the old outcome does not count any more."""
    daemon = daemon_with(silence=2.0)
    daemon.up()
    worker, name = daemon.worker(), new_request_id()
    send(daemon.people(), name)
    named = [(time.time(), time.time())]  # when the worker began to name it, and when it was answered
    first = worker.lease()
    worker.started(first)
    until = time.monotonic() + 3
    while time.monotonic() < until:
        begun = time.time()
        worker.report(ReplicaState.BUSY, running=(name,))
        named.append((begun, time.time()))
        time.sleep(0.1)
    status = wait_for(lambda: (found := _status(daemon, name)).state == RequestState.QUEUED and found)
    assert "attempt 1" in status.note
    queued = status.times[RequestState.QUEUED]
    last = max(begun for begun, answered in named if answered <= queued)
    assert queued - last > 1.9  # as long as its worker names it, it stays
    second = worker.lease()
    assert (second.attempt, second.result) == (2, str(daemon.places.requests / f"{name}.2.result"))
    with pytest.raises(HpcError, match="attempt 1"):
        worker.finish(first)
    worker.finish(second, b"of the second")
    assert daemon.people().call("GET", f"/v1/requests/{name}/result") == b"of the second"
    assert not Path(first.result).exists()


def test_a_daemon_that_was_stopped_blames_no_worker_for_its_silence(daemon_with):
    """Nobody could be heard meanwhile: what ran goes on running, for as long as a worker may be silent from then on."""
    daemon = daemon_with(silence=3.0)
    daemon.up()
    worker, name = daemon.worker(), new_request_id()
    send(daemon.people(), name)
    worker.started(worker.lease())
    daemon.process.send_signal(signal.SIGSTOP)
    time.sleep(4)
    woken = time.time()
    daemon.process.send_signal(signal.SIGCONT)
    status = wait_for(lambda: (found := _status(daemon, name)).state == RequestState.QUEUED and found)
    assert status.times[RequestState.QUEUED] - woken > 2.9


def test_a_request_that_loses_every_worker_fails_with_the_reason(daemon_with):
    """It is handed out as often as configured, then it fails; a cancelled one is not handed out again."""
    daemon = daemon_with(silence=0.5, attempts=2)
    daemon.up()
    worker, name, cancelled = daemon.worker(), new_request_id(), new_request_id()
    send(daemon.people(), name)
    for attempt in (1, 2):
        assert worker.lease().attempt == attempt
        wait_for(lambda: _status(daemon, name).state != RequestState.LEASED)
    status = wait_for(lambda: _ended(daemon, name))
    assert (status.state, status.error.kind) == (RequestState.FAILED, "ReplicaFailed")
    send(daemon.people(), cancelled)
    worker.started(worker.lease())
    daemon.people().call("DELETE", f"/v1/requests/{cancelled}")
    assert wait_for(lambda: _ended(daemon, cancelled)).state == RequestState.CANCELLED


def _status(daemon, name):
    return daemon.people().get(f"/v1/requests/{name}", RequestStatus)


def _ended(daemon, name):
    status = _status(daemon, name)
    return status if status.state.ended else None


def test_a_late_outcome_of_the_last_attempt_still_counts(daemon_with):
    """Queued again but not leased yet, a request is completed by the worker that had only fallen silent."""
    daemon = daemon_with(silence=0.2)
    daemon.up()
    worker, name = daemon.worker(), new_request_id()
    send(daemon.people(), name)
    lease = worker.lease()
    wait_for(lambda: _status(daemon, name).state == RequestState.QUEUED)
    worker.finish(lease)
    assert daemon.people().get(f"/v1/requests/{name}", RequestStatus).state == RequestState.COMPLETED


def test_a_clean_stop_leaves_neither_socket_nor_lease(daemon_with):
    """SIGTERM ends the daemon with 0, long polls included; replicas stay, and the next daemon has a larger epoch."""
    daemon = daemon_with()
    daemon.up()
    worker, before = daemon.worker(), daemon.lease()
    poll = threading.Thread(target=lambda: worker.lease(wait=30))
    poll.start()
    time.sleep(0.2)
    begun = time.monotonic()
    assert daemon.stop() == 0
    assert time.monotonic() - begun < 25  # the poll would have taken 30 s
    poll.join()
    assert not Path(before.socket).exists()
    assert not daemon.places.lease.exists()
    daemon.start()
    assert daemon.lease().epoch == before.epoch + 1
    worker.reconnect()
    worker.report(ReplicaState.READY)
    assert daemon.people().get("/v1/pools/smol", PoolStatus).replicas[0].state == ReplicaState.READY


def test_stop_with_workers_ends_every_job(daemon_with):
    """The daemon drains its replicas, waits for their processes, fails what waited, and is gone."""
    daemon = daemon_with()
    daemon.up(replicas=2)
    replicas = daemon.replicas(count=2)
    daemon.worker()
    name = new_request_id()
    send(daemon.people(), name)
    assert daemon.people().call("POST", "/v1/stop?workers=1") == b"{}"
    assert daemon.process.wait(120) == 0
    assert [psutil.pid_exists(int(r.job_id.split(":")[0])) for r in replicas] == [False, False]
    daemon.start()
    assert daemon.people().get("/v1/status", Status).pools == ()
    assert daemon.people().get(f"/v1/requests/{name}", RequestStatus).error.kind == "NotFound"


@pytest.mark.slow
def test_an_idle_daemon_uses_no_processor(daemon_with):
    """With a pool and workers that wait, it takes under 1 % of a core."""
    daemon = daemon_with()
    daemon.up()
    worker = daemon.worker()
    poll = threading.Thread(target=lambda: worker.lease(wait=30))
    poll.start()
    time.sleep(1)
    process = psutil.Process(daemon.process.pid)
    assert shares_at_rest([process], 0.01)[0] < 0.01
    os.kill(daemon.process.pid, signal.SIGTERM)
    poll.join()
