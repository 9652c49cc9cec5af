"""Replicas that nobody hears of are given up, and each end gets its true cause."""

from __future__ import annotations

import pytest

from nnsight_hpc.daemon.decisions import decide
from nnsight_hpc.daemon.health import cause_of, is_failed_start, lost, unserved, why_ended
from nnsight_hpc.daemon.steps import Cancel, Lose, Release, Submit
from nnsight_hpc.wire.states import EndCause, ReplicaState
from nnsight_hpc.wire.workers import EndRecord
from tests.daemon.known import CONFIG, NOW, Demand, decided, pool, replica

_R, _C = ReplicaState, EndCause


@pytest.mark.parametrize(("started", "is_lost"), [(NOW - 599, False), (NOW - 601, True)])
def test_a_job_whose_worker_does_not_register_is_given_up(started, is_lost):
    """Ten minutes after the job began to run."""
    assert bool(lost(replica("a", _R.STARTING, started=started), 0.0, NOW, CONFIG)) is is_lost


def test_a_daemon_that_was_not_there_gives_workers_time_to_register():
    """What counts is how long it has listened."""
    assert lost(replica("a", _R.STARTING, started=0.0), NOW - 599, NOW, CONFIG) == ""


@pytest.mark.parametrize("state", [_R.LOADING, _R.READY, _R.BUSY, _R.DRAINING])
def test_a_worker_that_is_silent_is_given_up_and_replaced(state):
    """Three minutes after it was last heard."""
    silent = replica("a", state)
    assert lost(silent, NOW - 179, NOW, CONFIG) == ""
    decision = decide(pool(), [silent], Demand(), lambda _: NOW - 181, now=NOW, config=CONFIG)
    assert [type(step) for step in decision.steps] == [Lose, Submit]


@pytest.mark.parametrize("state", [_R.SUBMITTED, _R.PENDING])
def test_a_job_may_wait_for_ever(state):
    """Nothing is to be heard of it."""
    assert lost(replica("a", state), 0.0, NOW, CONFIG) == ""


def test_a_replica_that_takes_too_long_to_end_is_cancelled():
    """One that was told to hurry, at the time that it was given; one whose successor serves never, unless all end."""
    hurried = replica("a", _R.DRAINING, drain=True, until=NOW)
    patient = replica("b", _R.DRAINING, drain=True)
    assert decided(pool("0:1"), hurried, patient).steps == (Cancel(hurried),)
    down = decided(pool("0:1", known={"down": True}), patient).steps
    assert down == (Release(patient, _C.DRAINED, "the pool is taken down"),)


def test_replicas_of_a_changed_pool_are_replaced():
    """But not for what makes no difference to a job."""
    old = replica("a")
    assert [type(step) for step in decided(pool(dtype="float16"), old).steps] == [Release, Submit]
    assert decided(pool("1:3", idle="1h", succession="gap"), old).steps == ()


def _record(cause, detail=""):
    return EndRecord(replica="a", cause=cause, detail=detail)


@pytest.mark.parametrize("said", [_C.WALLTIME, _C.PREEMPTED, _C.NODE_FAILED, _C.OUT_OF_MEMORY])
def test_what_slurm_knows_for_certain_is_the_cause(said):
    """Whatever its worker could guess, and whatever it was told."""
    assert cause_of(None, _record(_C.CANCELLED), said) == said
    assert cause_of(_C.DRAINED, None, said) == said


@pytest.mark.parametrize(
    ("told", "record", "said", "cause"),
    [
        (None, None, None, _C.CRASHED),
        (None, None, _C.CANCELLED, _C.CANCELLED),
        (None, _C.CRASHED, _C.CANCELLED, _C.CRASHED),
        (None, _C.CANCELLED, _C.CRASHED, _C.CANCELLED),
        (_C.IDLE, _C.DRAINED, _C.DRAINED, _C.IDLE),
        (_C.DRAINED, _C.CANCELLED, _C.CANCELLED, _C.DRAINED),
        (_C.DRAINED, _C.CRASHED, None, _C.CRASHED),
        (_C.IDLE, None, _C.CANCELLED, _C.IDLE),
        (None, None, _C.LOST, _C.LOST),
        (None, _C.OUT_OF_MEMORY, _C.LOST, _C.OUT_OF_MEMORY),
    ],
)
def test_the_cause_of_an_end(told, record, said, cause):
    """What we told it, then what its worker wrote, then what Slurm says; without any of these it has crashed."""
    assert cause_of(told, _record(record) if record else None, said) == cause


def test_the_reason_of_an_end_is_of_its_cause():
    """Why it was told to end; what its worker wrote of this cause; what Slurm says; else words for the cause."""
    told = replica("a", told=_C.IDLE, reason="idle")
    assert why_ended(told, _C.IDLE, _record(_C.DRAINED), "") == "idle"
    assert why_ended(told, _C.CRASHED, _record(_C.CRASHED, "no disk"), "exit code 1") == "no disk"
    assert why_ended(replica("a"), _C.PREEMPTED, _record(_C.CANCELLED, "TERM"), "preempted by 7") == "preempted by 7"
    assert why_ended(replica("a"), _C.LOST, None, "") == "it was not heard any more"


def test_what_counts_as_a_failed_start():
    """An end that is the pool's fault before it served; also a walltime that is over before the model is loaded."""
    loading = replica("a", _R.LOADING)
    assert is_failed_start(loading, _C.CRASHED)
    assert is_failed_start(loading, _C.WALLTIME)
    assert not is_failed_start(loading, _C.PREEMPTED)
    assert not is_failed_start(replica("a"), _C.CRASHED)
    assert not is_failed_start(replica("a", _R.LOADING, drain=True), _C.CRASHED)


def test_ends_in_a_row_before_a_replica_could_serve():
    """The latest ones; those that we wanted to end do not count."""
    served = replica("a", _R.ENDED, served=True, changed=1.0)
    failed = [replica(name, _R.ENDED, changed=time) for name, time in (("b", 2.0), ("c", 4.0))]
    told = replica("d", _R.ENDED, changed=3.0, told=_C.DRAINED)
    assert unserved([served, *failed, told, replica("e")]) == 2
    assert unserved([served, replica("f", _R.ENDED, served=True, changed=5.0), *failed]) == 0
