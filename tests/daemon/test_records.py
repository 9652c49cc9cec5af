"""What follows from what is stored of pools and replicas."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnsight_hpc.daemon.records import advance, job_of, measured, primaries, same_job, wanted
from nnsight_hpc.daemon.words import duration
from nnsight_hpc.wire.pools import Policy
from nnsight_hpc.wire.states import EndCause, ReplicaState
from tests.daemon.known import NOW, pool, replica

_R = ReplicaState


@pytest.mark.parametrize(
    ("spec", "gpus"),
    [
        ({}, 0),
        ({"nodes": 2, "tp": 8, "gpus_per_node": 4}, 8),
        ({"gres": "gpu"}, 1),
        ({"gres": "gpu:2"}, 2),
        ({"nodes": 2, "tp": 2, "gres": "gpu:a100:4,scratch:100"}, 8),
        ({"gres": "scratch:100"}, 0),
    ],
)
def test_the_gpus_of_a_replica(spec, gpus):
    """Given a node's number, or Slurm's gres."""
    assert replica("a", of=pool(**spec)).gpus == gpus


def test_gpu_seconds_count_from_the_start_of_the_job():
    """What only waited has used nothing."""
    of = pool(gpus_per_node=4)
    assert replica("a", started=NOW - 100, of=of).gpu_seconds(NOW) == 400
    assert replica("a", _R.PENDING, of=of).gpu_seconds(NOW) == 0


def test_what_makes_another_job_and_what_does_not():
    """How many there are and who may do what with them does not."""
    of = pool("1:3", idle="1h", succession="gap", policy=Policy(parameters=False))
    assert same_job(replica("a"), of)
    assert job_of(of.spec) == job_of(pool().spec)
    assert not same_job(replica("a"), pool(time="02:00:00"))


def test_successors_are_no_primaries_until_their_predecessor_goes():
    """Whether it has ended or takes nothing new."""
    old, heir = replica("a"), replica("b", _R.PENDING, succeeds="a")
    assert primaries(wanted(pool(), [old, heir])) == [old]
    assert primaries(wanted(pool(), [replica("a", drain=True), heir])) == [heir]
    assert primaries(wanted(pool(), [heir])) == [heir]


def _learnt(old, new, *, known=None, listens=0.0):
    return measured(pool(known=known), old, new, now=NOW, listens=listens)


def test_the_queue_is_measured_from_when_a_job_might_have_begun():
    """A successor does not wait before its begin."""
    waits = {"submitted": NOW - 500}
    new = replica("a", _R.STARTING, started=NOW - 10, **waits)
    assert _learnt(replica("a", _R.PENDING, **waits), new)["wait_seconds"] == 490
    heir = replica("a", _R.STARTING, started=NOW - 10, begin=NOW - 13, **waits)
    assert _learnt(replica("a", _R.PENDING, begin=NOW - 13, **waits), heir)["wait_seconds"] == 3


def test_the_load_is_measured_once_its_start_and_end_are_known():
    """In whichever order; but not where nobody listened, if anything is known already."""
    loading, ready = replica("a", _R.LOADING, started=NOW - 30), replica("a", started=NOW - 30, ready=NOW - 10)
    assert _learnt(loading, ready)["load_seconds"] == 20
    assert _learnt(replica("a", ready=NOW - 10), ready)["load_seconds"] == 20
    assert _learnt(loading, ready, known={"load_seconds": 5.0}, listens=NOW - 20) == {"failures": 0}
    assert _learnt(loading, ready, listens=NOW - 20)["load_seconds"] == 20
    assert _learnt(ready, replica("a", _R.BUSY, started=NOW - 30, ready=NOW - 10)) == {}


def test_the_drain_of_a_replica_whose_successor_serves_is_measured():
    """One that was hurried says nothing."""
    leaving = replica("a", _R.DRAINING, drain=True, changed=NOW - 9)
    ended = replica("a", _R.ENDED, drain=True, cause=EndCause.DRAINED)
    assert _learnt(leaving, ended)["drain_seconds"] == 9
    assert "drain_seconds" not in _learnt(replica("a", _R.DRAINING, drain=True, until=NOW), ended)


@given(st.sampled_from(list(_R)), st.sampled_from([_R.LOADING, _R.READY, _R.BUSY, _R.ENDED]))
def test_states_that_nobody_saw_are_passed_through(current, to):
    """A worker may be ready while the last thing known of it is that it was submitted; nothing leaves its end."""
    if current == _R.ENDED or (current == _R.DRAINING and to != _R.ENDED):
        return
    if (current, to) in ((_R.READY, _R.LOADING), (_R.BUSY, _R.LOADING)):
        return
    assert advance(current, to, of="a") == to


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(-1, "0 s"), (45, "45 s"), (119, "119 s"), (120, "2 min"), (7199, "120 min"), (7200, "2 h"), (180000, "2 d")],
)
def test_durations_in_words(seconds, words):
    """As a person would say them."""
    assert duration(seconds) == words
