"""Pools on a batch system whose jobs wait and have a walltime: a real daemon, and jobs that are processes."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

from nnsight_hpc.slurm.batch.embedded import EmbeddedExecutor
from nnsight_hpc.wire.errors import HpcError, InvalidInput, NotFound, Unreachable, from_report
from nnsight_hpc.wire.files import write_atomically
from nnsight_hpc.wire.messages import RequestStatus, Story, decode
from nnsight_hpc.wire.names import new_request_id
from nnsight_hpc.wire.pools import Plan, PoolStatus
from nnsight_hpc.wire.states import EndCause, ReplicaState, RequestState
from nnsight_hpc.wire.workers import EndRecord
from tests.daemon.batch import PROLOG, by_hand, is_gone, looks, set_rules
from tests.daemon.process import Worker, send, wait_for

_R, _C = ReplicaState, EndCause
GAP = {"succession": "gap"}  # no successors, where they are not what is looked at
QUICK = {"batch": True, "poll": (0.3, 0.4), "asked": 0.2, "look": 0.05, "retry": 0.1, "margin": 1.0}


@pytest.fixture
def batch(daemon_with):
    """Start a daemon whose jobs wait and have a walltime; everything goes quicker than usual."""

    def start(**settings):
        return daemon_with(**{"job": "timed_job", **QUICK, **settings})

    return start


def _pool(daemon):
    return daemon.people().get("/v1/pools/smol", PoolStatus)


def _first(daemon):
    """The pool's first replica, once its job is known."""
    return daemon.replicas()[0]


def _replicas(daemon, *states):
    return [one for one in _pool(daemon).replicas if one.state in states]


def _worker(daemon, replica):
    worker = Worker(daemon, replica)
    worker.register()
    worker.report(_R.READY)
    return worker


def _told(daemon):
    return [event.text for event in daemon.people().get("/v1/pools/smol/story", Story).events]


def _pid(replica):
    return int(replica.job_id.split(":")[0])


def _request(daemon):
    name = new_request_id()
    send(daemon.people(), name)
    return name


def _state(daemon, name):
    return daemon.people().get(f"/v1/requests/{name}", RequestStatus).state


# -- succession --------------------------------------------------------------------------------------------------------


def _ask(daemon):
    """Send one request and wait for its answer, through the death of the daemon; the same id is the same request."""
    name = new_request_id()
    while True:
        try:
            send(daemon.people(), name)
            status = daemon.people().get(f"/v1/requests/{name}?wait=20", RequestStatus)
            while not status.state.ended:
                status = daemon.people().get(f"/v1/requests/{name}?wait=20&seen={status.state}", RequestStatus)
        except Unreachable:
            time.sleep(0.05)
        else:
            return status.state


@pytest.mark.slow
def test_a_pool_serves_through_its_walltimes_while_somebody_asks_without_pause(batch):
    """Two hand-overs, and the daemon killed between them: no request fails, and none waits for a load."""
    daemon = batch(job="serving_job", margin=10.0)  # half of the walltime is the lead: a busy machine may take its time
    daemon.up(time="00:20")
    wait_for(lambda: _replicas(daemon, _R.READY))
    states, killed = [], False
    until = time.monotonic() + 120
    while len(ended := _replicas(daemon, _R.ENDED)) < 2 and time.monotonic() < until:
        if len(ended) == 1 and not killed:
            killed = True
            daemon.kill()
            daemon.start()
        states.append(_ask(daemon))
        time.sleep(0.2)
    assert [one.cause for one in ended] == [_C.DRAINED] * 2, daemon.log()
    assert set(states) == {RequestState.COMPLETED}
    chain = _pool(daemon).replicas
    assert [new.succeeds for old, new in pairwise(chain)] == [old.id for old, _ in pairwise(chain)]
    assert all(new.ready < old.changed for old, new in pairwise(chain[:3]))
    heirs = [one.id for one in chain[1:3]]  # which served before they made way
    assert [one.reason for one in ended] == [f"its successor {heir} serves" for heir in heirs]


def test_a_site_that_refuses_a_successor_gets_one_job_at_a_time(batch):
    """The pool goes on, says why requests will wait, keeps them, and the next replica is submitted when one has ended."""
    daemon = batch(retry=0.5)
    set_rules(daemon.places.home, refuse_later="QOSMaxSubmitJobPerUserLimit")
    daemon.up(time="10:00")
    first = _first(daemon)
    _worker(daemon, first.id)
    wait_for(lambda: "QOSMaxSubmitJobPerUserLimit" in _pool(daemon).note)
    assert _pool(daemon).held is None
    assert [one.id for one in _replicas(daemon, _R.READY)] == [first.id]
    over = {first.job_id: "WALLTIME"}
    set_rules(daemon.places.home, refuse="QOSMaxSubmitJobPerUserLimit", causes=over)  # it has not left the queue yet
    os.kill(_pid(first), signal.SIGKILL)
    ended = wait_for(lambda: [one for one in _replicas(daemon, _R.ENDED) if one.id == first.id])
    assert ended[0].cause == _C.WALLTIME
    name = _request(daemon)
    wait_for(lambda: [one for one in _replicas(daemon, _R.ENDED) if one.submitted > ended[0].changed])
    set_rules(daemon.places.home)
    assert (_state(daemon, name), _pool(daemon).held) == (RequestState.QUEUED, None)
    new = wait_for(lambda: [one for one in _replicas(daemon, _R.STARTING) if one.submitted > ended[0].changed])
    assert _worker(daemon, new[0].id).lease().id == name


def test_a_replica_that_ends_early_is_replaced_at_once(batch):
    """Its successor would begin much later, and goes; what it had begun is run again."""
    daemon = batch()
    daemon.up(time="10:00")
    first = _first(daemon)
    worker, name = _worker(daemon, first.id), _request(daemon)
    worker.started(worker.lease())
    heir = wait_for(lambda: _replicas(daemon, _R.PENDING))[0]
    assert (heir.succeeds, heir.begins > time.time() + 60) == (first.id, True)
    set_rules(daemon.places.home, causes={first.job_id: "PREEMPTED"})
    os.kill(_pid(first), signal.SIGKILL)
    new = wait_for(lambda: _replicas(daemon, _R.STARTING))[0]
    ended = wait_for(lambda: len(found := _replicas(daemon, _R.ENDED)) == 2 and found)
    assert {one.id: one.cause for one in ended} == {first.id: _C.PREEMPTED, heir.id: _C.DRAINED}
    assert _worker(daemon, new.id).lease().id == name
    assert _pool(daemon).held is None


def test_a_walltime_that_an_admin_changes_is_the_one_that_counts(batch):
    """The worker's word of its end is that of its start; what the batch system says later is newer."""
    daemon = batch()
    daemon.up(time="10:00")
    first = _first(daemon)
    worker = _worker(daemon, first.id)
    old = wait_for(lambda: _pool(daemon).replicas[0].ends)
    known = daemon.places.replica(first.id) / "batch.json"
    changed = json.loads(known.read_bytes()) | {"ends": old + 3600}
    write_atomically(known, json.dumps(changed).encode())
    wait_for(lambda: _pool(daemon).replicas[0].ends == old + 3600)
    worker.report(_R.READY, ends=old)
    assert _pool(daemon).replicas[0].ends == old + 3600


# -- scaling -----------------------------------------------------------------------------------------------------------


def test_an_idle_pool_goes_down_to_none_and_comes_back_by_itself(batch):
    """The requester is told what is waited for."""
    daemon = batch()
    daemon.up(replicas="0:1", idle="1s", **GAP)
    _worker(daemon, _first(daemon).id)
    ended = wait_for(lambda: _replicas(daemon, _R.ENDED))[0]
    assert (ended.cause, _pool(daemon).desired) == (_C.IDLE, 0)
    assert _pool(daemon).note == "no replica: one is started when a request arrives"
    set_rules(daemon.places.home, wait=600)
    name = _request(daemon)
    pending = wait_for(lambda: _replicas(daemon, _R.PENDING))[0]
    waits_for = daemon.people().get(f"/v1/requests/{name}", RequestStatus).waits_for
    assert f"job {pending.job_id} waits" in waits_for
    assert "others come first" in waits_for
    assert _worker(daemon, pending.id).lease().id == name


def test_requests_that_wait_bring_one_more_replica_and_never_two_at_once(batch):
    """As long as one is on its way, no other is submitted; at the most it ends."""
    daemon = batch(scale_wait=0.3)
    daemon.up(replicas="1:3", **GAP)
    worker = _worker(daemon, _first(daemon).id)
    names = [_request(daemon) for _ in range(3)]
    worker.started(worker.lease())
    second = wait_for(lambda: _replicas(daemon, _R.STARTING))[0]
    time.sleep(0.6)
    assert len(_pool(daemon).replicas) == 2
    other = _worker(daemon, second.id)
    other.started(other.lease())
    wait_for(lambda: _replicas(daemon, _R.STARTING))
    assert _pool(daemon).desired == 3
    assert any("a request has waited" in text for text in _told(daemon))
    assert _state(daemon, names[2]) == RequestState.QUEUED


# -- health ------------------------------------------------------------------------------------------------------------


def test_a_job_whose_worker_never_registers_holds_the_pool_until_it_is_resumed(batch):
    """Each is given up with the end of its log; after three the pool waits for a person."""
    daemon = batch(register=0.5)
    daemon.up()
    wait_for(lambda: _pool(daemon).held)
    ended = _replicas(daemon, _R.ENDED)
    assert [one.cause for one in ended] == [_C.LOST] * 3
    assert "has not registered" in ended[0].reason
    assert ended[-1].tail.startswith(PROLOG)
    wait_for(lambda: all(is_gone(one) for one in ended))
    daemon.people().call("POST", "/v1/pools/smol/resume")
    assert len(wait_for(lambda: _replicas(daemon, _R.ENDED)[3:] or _replicas(daemon, _R.STARTING))) > 0


def test_a_worker_that_falls_silent_is_replaced(batch):
    """What it held is run again by the next; the job that nobody hears is ended."""
    daemon = batch(lost=5.0)
    daemon.up(**GAP)
    first = _first(daemon)
    worker, name = _worker(daemon, first.id), _request(daemon)
    worker.started(worker.lease())
    new = wait_for(lambda: [one for one in _replicas(daemon, _R.STARTING) if one.id != first.id])[0]
    assert _worker(daemon, new.id).lease().id == name
    assert _pool(daemon).replicas[0].cause == _C.LOST
    wait_for(lambda: is_gone(first))


def test_a_worker_that_is_heard_is_not_given_up(batch):
    """However long it has nothing to do: only when it was silent for so long."""
    daemon = batch(lost=2.0)
    daemon.up(**GAP)
    begun = time.time()
    worker = Worker(daemon, _first(daemon).id)
    worker.register()
    heard = [(begun, time.time())]  # when it began to say something, and when it was answered
    until = time.monotonic() + 3
    while time.monotonic() < until:
        begun = time.time()
        with suppress(NotFound):  # this machine was so busy that it was silent
            worker.report(_R.READY)
            heard.append((begun, time.time()))
        time.sleep(0.1)
    ended = wait_for(lambda: _replicas(daemon, _R.ENDED))[0]
    last = max(begun for begun, answered in heard if answered <= ended.changed)
    assert (ended.cause, ended.changed - last > 1.9) == (_C.LOST, True)


def test_a_daemon_that_was_stopped_does_not_take_its_workers_for_silent(batch):
    """It is the one that has not listened: they have as long as ever from then on."""
    daemon = batch(lost=3.0)
    daemon.up(**GAP)
    _worker(daemon, _first(daemon).id)
    daemon.process.send_signal(signal.SIGSTOP)
    time.sleep(4)
    woken = time.time()
    daemon.process.send_signal(signal.SIGCONT)
    ended = wait_for(lambda: _replicas(daemon, _R.ENDED))[0]
    assert (ended.cause, ended.changed - woken > 2.9) == (_C.LOST, True)


def test_a_daemon_that_dies_while_it_submits_finds_the_job_again(batch):
    """It is not submitted twice."""
    daemon = batch()
    set_rules(daemon.places.home, kill_daemon=True)
    with pytest.raises(HpcError):
        daemon.up()
    daemon.process.wait(120)
    wait_for(lambda: EmbeddedExecutor().survey([], daemon.places).ours)  # the job's script has come so far
    daemon.start()
    found = wait_for(lambda: [one for one in _pool(daemon).replicas if one.job_id])
    wait_for(lambda: [one.state for one in _pool(daemon).replicas] == [_R.STARTING])
    assert not is_gone(found[0])


def test_while_the_batch_system_is_away_nothing_is_lost_and_nothing_submitted_twice(batch):
    """People are told; a job whose submission was not answered is found, and one that was not submitted is tried again."""
    daemon = batch()
    set_rules(daemon.places.home, away="slurmctld does not answer", lost_answer=True)
    daemon.up()
    first = daemon.newest()
    assert (first.state, first.job_id) == (_R.SUBMITTED, "")
    assert "slurmctld does not answer" in wait_for(lambda: _pool(daemon).note)
    set_rules(daemon.places.home)
    wait_for(lambda: [(one.id, one.state) for one in _pool(daemon).replicas] == [(first.id, _R.STARTING)])
    set_rules(daemon.places.home, away="slurmctld does not answer")
    _look_again(daemon)  # a look that has begun before that may see more
    os.kill(_pid(_first(daemon)), signal.SIGKILL)
    _look_again(daemon, times=3)
    assert [one.state for one in _pool(daemon).replicas] == [_R.STARTING]  # nobody knows better
    set_rules(daemon.places.home)
    wait_for(lambda: [one.state for one in _pool(daemon).replicas] == [_R.ENDED, _R.STARTING])


def _look_again(daemon, times=1):
    """Wait until the jobs were looked at so often from now on."""
    before = len(looks(daemon.places.home))
    wait_for(lambda: len(looks(daemon.places.home)) > before + times)  # the last has begun, so those before it are over


def test_a_job_that_outlives_its_replica_is_cancelled(batch):
    """Also when the batch system was away at the time at which it should have been."""
    daemon = batch(lost=5.0, lingering=0.5)
    daemon.up()
    first = _first(daemon)
    _worker(daemon, first.id)
    daemon.people().call("DELETE", "/v1/pools/smol")
    assert wait_for(lambda: is_gone(first))


def test_a_walltime_that_is_too_short_to_load_holds_the_pool(batch):
    """To try for ever would only cost."""
    daemon = batch()
    daemon.up(time="00:02", **GAP)
    while not _pool(daemon).held:
        for new in _replicas(daemon, _R.STARTING):
            with suppress(NotFound):  # it has ended since
                Worker(daemon, new.id).register()
        time.sleep(0.05)
    assert [one.cause for one in _replicas(daemon, _R.ENDED)] == [_C.WALLTIME] * 3
    assert "3 times in a row" in _pool(daemon).held.what


def test_a_worker_that_is_signalled_is_replaced_while_the_batch_system_finds_out_why(batch):
    """Its request runs again at once; the cause is that of the batch system."""
    daemon = batch(poll=(2.0, 2.1))
    daemon.up(**GAP)
    first = _first(daemon)
    worker, name = _worker(daemon, first.id), _request(daemon)
    worker.started(worker.lease())
    worker.post("/w1/end", EndRecord(replica=first.id, cause=_C.CANCELLED, detail="SIGTERM"))
    assert _state(daemon, name) == RequestState.QUEUED
    assert [one.state for one in _pool(daemon).replicas][:1] == [_R.DRAINING]
    wait_for(lambda: len(_pool(daemon).replicas) == 2)
    set_rules(daemon.places.home, causes={first.job_id: "PREEMPTED"})
    os.kill(_pid(first), signal.SIGKILL)
    assert wait_for(lambda: _replicas(daemon, _R.ENDED))[0].cause == _C.PREEMPTED


def test_a_job_that_was_submitted_by_hand_joins_while_it_still_waits(batch):
    """Once the jobs are looked at, if its pool is to have one more like it."""
    daemon = batch(retry=60)
    daemon.up(replicas=2, **GAP)
    _, second = daemon.replicas(count=2)
    os.kill(_pid(second), signal.SIGKILL)
    wait_for(lambda: _replicas(daemon, _R.ENDED))
    given = msgspec.json.encode({"model": "org/model", "replicas": 2, **GAP})
    path = Path(decode(daemon.people().call("POST", "/v1/pools/smol/plan", given), Plan).path)
    job = by_hand(path)
    joined = wait_for(lambda: [one for one in _replicas(daemon, _R.STARTING) if one.id == path.parent.name])[0]
    assert joined.job_id.startswith(f"{job}:")
    assert f"taken up: job {joined.job_id}" in _told(daemon)


# -- what people see ---------------------------------------------------------------------------------------------------


def test_up_says_why_the_job_waits_where_it_stands_and_when_it_begins(batch):
    """In its own answer, for the reason is asked for soon after the submission."""
    daemon = batch()
    set_rules(daemon.places.home, wait=600)
    (replica,) = wait_for(lambda: [one for one in daemon.up().replicas if one.state == _R.PENDING])  # at once, or again
    assert (replica.reason, replica.position) == ("others come first", 7)
    assert 300 < replica.begins - time.time() < 600
    assert _pool(daemon).note.startswith(f"job {replica.job_id} waits (expected to start in 10 min): others come first")
    daemon.people().call("DELETE", "/v1/pools/smol")
    wait_for(lambda: is_gone(replica))


def test_a_refused_pool_is_held_with_the_words_of_the_batch_system(batch):
    """To try again would not help; what is wrong on its face is not even stored."""
    daemon = batch()
    set_rules(daemon.places.home, refuse="invalid account")
    with pytest.raises(InvalidInput, match="invalid account"):
        daemon.up()
        raise from_report(wait_for(lambda: _pool(daemon).held))  # where it was not refused at once
    pool = _pool(daemon)
    assert [(one.state, one.cause) for one in pool.replicas] == [(_R.ENDED, _C.NOT_SUBMITTED)]
    assert pool.held.why == "invalid account"
    with pytest.raises(InvalidInput, match="time cannot be"):
        daemon.up(time="soon")


def test_the_story_of_a_pool_has_each_step_of_its_replicas(batch):
    """In words, with what was decided and why."""
    daemon = batch()
    daemon.up(**GAP)
    replica = wait_for(lambda: _replicas(daemon, _R.STARTING))[0]
    _worker(daemon, replica.id)
    daemon.people().call("DELETE", "/v1/pools/smol")
    wait_for(lambda: _told(daemon)[-1].startswith("ended"))
    told = _told(daemon)
    assert told[:4] == [
        "asked for: org/model, replicas 1",
        "to be submitted",
        f"submitted as job {replica.job_id}",
        "its job runs on n1",
    ]
    assert told[4:6] == ["its worker has registered from n1 and loads the model", told[5]]
    assert told[5].startswith("it serves, ")
    assert told[-3:] == ["taken down", "told to end: the pool is taken down", "ended (drained): the pool is taken down"]


def test_gpu_hours_are_counted(batch):
    """Of what runs, and of what has ended."""
    daemon = batch()
    daemon.up(gpus_per_node=4)
    wait_for(lambda: _pool(daemon).gpu_seconds > 2)
    replica = _pool(daemon).replicas[0]
    assert _pool(daemon).gpu_seconds < 4 * (time.time() - replica.started) + 1
    os.kill(_pid(replica), signal.SIGKILL)
    wait_for(lambda: _replicas(daemon, _R.ENDED))
    assert _pool(daemon).gpu_seconds > 2


def test_the_batch_system_is_asked_seldom(batch):
    """However many pools there are, in the background once in a period; what a person asks for comes in addition."""
    daemon = batch(poll=(1.0, 1.1))
    for name in ("one", "two", "three"):
        daemon.up(name)
    before = len(looks(daemon.places.home))
    later = wait_for(lambda: len(found := looks(daemon.places.home)[before:]) > 3 and found)
    assert later[-1] - later[0] > 1.5  # three periods, of which the last pool's look may be one
