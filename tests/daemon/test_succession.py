"""A replica's successor serves before the replica's walltime ends; where only one job is allowed, people are told."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnsight_hpc.daemon.records import left
from nnsight_hpc.daemon.steps import Release, Submit
from nnsight_hpc.daemon.succession import lead
from nnsight_hpc.wire.errors import ErrorReport
from nnsight_hpc.wire.states import EndCause, ReplicaState
from tests.daemon.known import CONFIG, NOW, decided, pool, replica
from tests.daemon.simulation import Simulation

_R = ReplicaState
KNOWN = {"load_seconds": 40.0}


def test_the_lead_is_what_was_measured_and_a_margin_within_half_of_the_walltime():
    """One and a half loads, the last wait, the last drain, the time before the end when a job takes nothing new."""
    known = {"load_seconds": 40.0, "wait_seconds": 100.0, "drain_seconds": 7.0}
    assert lead(pool(time="12:00:00", known=known), CONFIG) == 120 + 60 + 100 + 7 + 30
    assert lead(pool(time="00:02:00", known=known), CONFIG) == 60


@pytest.mark.parametrize("state", [_R.STARTING, _R.LOADING, _R.READY, _R.BUSY])
def test_the_successor_is_submitted_as_soon_as_the_job_runs(state):
    """To begin ahead of the end by the lead; not before the load time was measured once, nor the end is known."""
    of = pool(time="01:00:00", known=KNOWN)
    running = replica("a", state, ends=NOW + 3000)
    assert decided(of, running).steps == (Submit(succeeds="a", begin=NOW + 3000 - 210),)
    assert decided(pool(time="01:00:00"), running).steps == ()
    assert decided(of, replica("a", state)).steps == ()


def test_a_successor_that_should_have_begun_begins_at_once():
    """A time in the past is no reason to wait."""
    assert decided(pool(known=KNOWN), replica("a", ends=NOW + 100)).steps == (Submit(succeeds="a"),)


@pytest.mark.parametrize("state", [_R.SUBMITTED, _R.PENDING, _R.STARTING, _R.LOADING])
def test_there_is_one_successor_and_it_has_none_itself(state):
    """Until it takes over."""
    of, old = pool(known=KNOWN), replica("a", ends=NOW + 100)
    assert decided(of, old, replica("b", state, succeeds="a", ends=NOW + 3600)).steps == ()


def test_a_replica_whose_successor_serves_takes_nothing_new_and_finishes_without_hurry():
    """As long as its walltime lasts."""
    old, heir = replica("a", _R.BUSY, ends=NOW + 100), replica("b", succeeds="a", ends=NOW + 3600)
    steps = decided(pool(known=KNOWN), old, heir).steps
    assert steps == (Release(old, EndCause.DRAINED, "its successor b serves", hurry=False),)


def test_the_next_successor_follows_when_the_first_has_taken_over():
    """While the old one drains, and after it has ended."""
    of, heir = pool(known=KNOWN, time="01:00:00"), replica("b", succeeds="a", ends=NOW + 3600)
    leaving = replica("a", _R.DRAINING, drain=True, ends=NOW + 100)
    assert decided(of, leaving, heir).steps == decided(of, heir).steps == (Submit(succeeds="b", begin=NOW + 3390),)


@pytest.mark.parametrize("begin", [None, NOW - 5, NOW + 29])
def test_a_successor_that_begins_soon_takes_the_place_of_one_that_ended_early(begin):
    """No other is submitted."""
    assert decided(pool(known=KNOWN), replica("b", _R.PENDING, succeeds="a", begin=begin)).steps == ()


def test_a_successor_that_would_begin_much_later_is_replaced_at_once():
    """The one that was planned for the end of the walltime helps nobody when its predecessor is dead already."""
    heir = replica("b", _R.PENDING, succeeds="a", begin=NOW + 3000)
    release, submit = decided(pool(known=KNOWN), heir).steps
    assert (release.replica, submit) == (heir, Submit())


def test_a_successor_that_runs_stays_however_early():
    """Its begin does not count any more."""
    assert decided(pool(), replica("b", _R.LOADING, succeeds="a", begin=NOW + 3000)).steps == ()


@pytest.mark.parametrize("of", [pool(succession="gap", known=KNOWN), pool(known={**KNOWN, "gap": "one job a user"})])
def test_in_gap_mode_nothing_is_submitted_before_the_replica_has_ended(of):
    """Because it was asked for, or since the site has refused a successor."""
    assert decided(of, replica("a", ends=NOW + 1)).steps == ()
    assert decided(of, replica("a", _R.DRAINING, ends=NOW + 1)).steps == (Submit(),)


def test_a_held_pool_gets_no_successor():
    """It starts nothing."""
    held = ErrorReport("HpcError", "no")
    assert decided(pool(known={**KNOWN, "held": held}), replica("a", ends=NOW + 1)).steps == ()


def test_a_replica_without_a_known_end_has_no_end():
    """So requests of any length may go there."""
    assert left(replica("a")) == float("inf")


@settings(max_examples=20, deadline=None)
@given(
    load=st.floats(1, 300),
    wait=st.floats(0, 120),
    walltime=st.integers(20, 120),
    replicas=st.integers(1, 3),
    growth=st.floats(0.5, 1.4),
)
def test_once_a_pool_serves_it_always_serves_as_many(load, wait, walltime, replicas, growth):
    """Through four walltimes, whatever a load and the queue take, as long as they take about as long as the last time."""
    of = pool(replicas, time=f"{walltime}:00")
    cluster = Simulation(of, load=load, wait=wait, growth=growth, poll=45, step=8)
    cluster.run(until=lambda: len(cluster.serving()) == replicas, seconds=2 * load + wait + 120)
    fewest = cluster.run(until=lambda: False, seconds=4 * 60 * walltime)
    assert fewest >= replicas
    assert cluster.most_jobs <= 3 * replicas


def test_a_pool_of_two_minute_jobs_serves_without_a_gap():
    """The shortest that is shown on the test cluster: half of the walltime is the lead."""
    cluster = Simulation(pool(time="00:02:00"), load=10, wait=3, growth=1.2, poll=45, step=1)
    cluster.run(until=cluster.serving, seconds=60)
    assert cluster.run(until=lambda: False, seconds=1200) == 1
