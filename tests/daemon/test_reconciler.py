"""Pools are made true: jobs are submitted, watched, replaced, given up, drained, with the embedded executor."""

from __future__ import annotations

import os
import signal
from contextlib import suppress

import pytest

from nnsight_hpc.wire.errors import NotFound, ReplicaFailed
from nnsight_hpc.wire.messages import ModelIdentity, RequestStatus
from nnsight_hpc.wire.names import new_request_id
from nnsight_hpc.wire.pools import LogPart, PoolStatus, Status
from nnsight_hpc.wire.states import EndCause, ReplicaState, RequestState
from nnsight_hpc.wire.workers import EndRecord
from tests.daemon.batch import is_gone
from tests.daemon.process import Worker, run_frame, send, wait_for


def _pool(daemon, name="smol"):
    return daemon.people().get(f"/v1/pools/{name}", PoolStatus)


def _request(daemon, name):
    return daemon.people().get(f"/v1/requests/{name}", RequestStatus)


def _pid(replica):
    return int(replica.job_id.split(":")[0])


def test_a_pool_whose_jobs_end_before_they_serve_is_held_with_the_logs_last_lines(daemon_with):
    """After three tries no more are made; who waits gets the reason and the log's end, and so does who comes later."""
    daemon = daemon_with(job="failing_job", retry=0.05)
    with suppress(ReplicaFailed):  # it may fail three times before `up` has to answer
        daemon.up()
    name = new_request_id()
    with pytest.raises(ReplicaFailed) as caught:
        send(daemon.people(), name)
        wait_for(lambda: daemon.people().get(f"/v1/requests/{name}?wait=10&seen=QUEUED", RequestStatus).state.ended)
        daemon.people().call("GET", f"/v1/requests/{name}/result")
    assert "3 times in a row" in caught.value.what
    assert "exit code 1" in caught.value.why
    assert "line 29\nno module named cuda_of_our_dreams" in caught.value.why
    pool = _pool(daemon)
    assert [r.state for r in pool.replicas] == [ReplicaState.ENDED] * 3
    assert pool.held.why == caught.value.why
    with pytest.raises(ReplicaFailed, match="3 times"):
        send(daemon.people(), new_request_id())
    assert "line 29\nno module named cuda_of_our_dreams" in pool.replicas[-1].tail
    assert not list(daemon.places.replicas.glob("*/job.json"))
    with suppress(ReplicaFailed):
        daemon.up()
    assert len(wait_for(lambda: _pool(daemon).held and list(daemon.places.replicas.iterdir()))) == 6


def test_a_pool_with_one_replica_that_serves_goes_on_when_others_fail(daemon_with):
    """No more replicas are started, which the pool's status says, but requests go to the one there is."""
    daemon = daemon_with(retry=0.05, starts=1, poll=(0.1, 0.2))
    daemon.up(replicas=2)
    other, _ = daemon.replicas(count=2)
    worker, name = daemon.worker(), new_request_id()
    os.kill(_pid(other), signal.SIGKILL)
    assert wait_for(lambda: _pool(daemon).held).kind == "ReplicaFailed"
    send(daemon.people(), name)
    assert worker.lease().id == name


def test_a_replica_that_dies_is_replaced_and_its_request_runs_again(daemon_with):
    """Killed while it ran a request, the process is missed within seconds; the request goes to the next replica."""
    daemon = daemon_with(retry=0.1, poll=(0.2, 0.3))
    daemon.up()
    worker, name = daemon.worker(), new_request_id()
    send(daemon.people(), name)
    worker.started(worker.lease())
    os.kill(_pid(_pool(daemon).replicas[-1]), signal.SIGKILL)
    wait_for(lambda: (found := _request(daemon, name)).state == RequestState.QUEUED and worker.replica in found.note)
    wait_for(lambda: _pool(daemon).replicas[-1].state == ReplicaState.STARTING)
    ended, _ = _pool(daemon).replicas
    assert (ended.id, ended.state, "kill" in ended.reason.lower()) == (worker.replica, ReplicaState.ENDED, True)
    assert daemon.worker().lease().attempt == 2


def test_a_workers_own_words_say_why_it_ended(daemon_with):
    """What it said at its end counts at once, with the end of its log; nobody waits for the batch system."""
    daemon = daemon_with(retry=30, poll=(60, 60))
    daemon.up()
    worker = daemon.worker()
    wait_for((daemon.places.replica(worker.replica) / "log").read_text)
    worker.post("/w1/end", EndRecord(replica=worker.replica, cause=EndCause.CRASHED, detail="no memory on the GPU"))
    (ended,) = _pool(daemon).replicas
    assert (ended.state, ended.cause, ended.reason) == (ReplicaState.ENDED, EndCause.CRASHED, "no memory on the GPU")
    assert ended.tail == "here I am"


def test_down_drains_what_serves_and_forgets_the_pool(daemon_with):
    """A ready worker gets USR2 and may finish; once it has ended, the pool is not there any more."""
    daemon = daemon_with()
    daemon.up()
    worker, name = daemon.worker(), new_request_id()
    replica = _pool(daemon).replicas[0]
    send(daemon.people(), name)
    daemon.people().call("DELETE", "/v1/pools/smol")
    assert daemon.people().get(f"/v1/requests/{name}", RequestStatus).state == RequestState.FAILED
    assert worker.lease(wait=30) is None
    wait_for(lambda: not daemon.people().get("/v1/status", Status).pools)
    wait_for(lambda: is_gone(replica))
    with pytest.raises(NotFound):
        _pool(daemon)


def test_fewer_replicas_and_another_model_end_the_old_jobs(daemon_with):
    """The number of jobs follows the wish; a changed model replaces the replica."""
    daemon = daemon_with(retry=0.1)
    daemon.up(replicas=2)
    wait_for(lambda: [r.state for r in _pool(daemon).replicas] == [ReplicaState.STARTING] * 2)
    first, second = _pool(daemon).replicas
    daemon.up(replicas=1)
    wait_for(lambda: [r.state.ended for r in _pool(daemon).replicas] == [False, True])
    wait_for(lambda: is_gone(second))
    daemon.up(replicas=1, dtype="float16")
    wait_for(lambda: [r.state.ended for r in _pool(daemon).replicas] == [True, True, False])
    wait_for(lambda: is_gone(first))
    assert _pool(daemon).held is None


def test_a_worker_of_the_old_model_gets_no_request_of_the_new_one(daemon_with):
    """Once a pool's model has changed, its old worker is shown as draining, leases nothing, and says nothing of the model."""
    daemon = daemon_with(job="deaf_job", retry=30, drain=30)
    daemon.up()
    worker, name = daemon.worker(), new_request_id()
    wait_for(lambda: daemon.people().get("/v1/pools/smol/log", LogPart).text)
    worker.report(ReplicaState.READY, model=ModelIdentity(id="org/model", fingerprint="old"))
    changed = daemon.up(revision="2")
    assert [r.state for r in changed.replicas if r.id == worker.replica] == [ReplicaState.DRAINING]
    wait_for(lambda: daemon.newest().id != worker.replica)
    assert worker.report(ReplicaState.READY, model=ModelIdentity(id="org/model", fingerprint="old")).drain
    assert _pool(daemon).model is None
    send(daemon.people(), name, frame=run_frame("new"))
    assert worker.lease(wait=0.2) is None
    assert daemon.worker().lease().id == name


def test_with_fewer_replicas_the_one_that_serves_stays(daemon_with):
    """Of two, the one that has not loaded yet ends, though it is the younger one."""
    daemon = daemon_with(retry=0.1)
    daemon.up(replicas=2)
    wait_for(lambda: [r.state for r in _pool(daemon).replicas] == [ReplicaState.STARTING] * 2)
    first, second = _pool(daemon).replicas
    worker = Worker(daemon, first.id)
    worker.register()
    worker.report(ReplicaState.READY)
    daemon.up(replicas=1)
    wait_for(lambda: [r.id for r in _pool(daemon).replicas if r.state.ended] == [second.id])
    assert worker.report(ReplicaState.READY).drain is False
