"""The number of replicas follows the queue, between a pool's least and most, by one step at a time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnsight_hpc.daemon.backlog import Demand
from nnsight_hpc.daemon.records import primaries, wanted
from nnsight_hpc.daemon.scaling import scale
from nnsight_hpc.daemon.steps import Release, Submit
from nnsight_hpc.wire.errors import ErrorReport
from nnsight_hpc.wire.states import EndCause, ReplicaState
from tests.daemon.known import CONFIG, NOW, decided, pool, replica

_R = ReplicaState


def _scaled(pool, *present, demand=None):
    return scale(pool, present, demand or Demand(), NOW, CONFIG)


def test_a_request_brings_a_pool_of_none_its_first_replica_at_once():
    """However short it has waited."""
    scaled = _scaled(pool("0:2"), demand=Demand(1, 0, NOW))
    assert (scaled.desired, scaled.because) == (1, "a request waits, and there is no replica")


@pytest.mark.parametrize(
    ("demand", "desired"),
    [
        (Demand(1, 1, NOW - 19), 1),
        (Demand(1, 1, NOW - 21), 2),
        (Demand(4, 1, NOW), 1),
        (Demand(5, 1, NOW), 2),
        (Demand(0, 1, None), 1),
    ],
)
def test_one_more_when_requests_wait_too_long_or_are_too_many(demand, desired):
    """Twenty seconds, or more than four for each replica that serves; what runs does not count."""
    assert _scaled(pool("1:3"), replica("a", _R.BUSY), demand=demand).desired == desired


@pytest.mark.parametrize("state", [_R.SUBMITTED, _R.PENDING, _R.STARTING, _R.LOADING])
def test_nothing_more_while_one_is_on_its_way(state):
    """It may do, and at most one job more than needed waits."""
    demand = Demand(100, 0, NOW - 1000)
    assert _scaled(pool("1:3"), replica("a", state), demand=demand).desired == 1
    assert _scaled(pool("1:3", desired=2), replica("a"), replica("b", state), demand=demand).desired == 2


@pytest.mark.parametrize("known", [{"down": True}, {"held": ErrorReport("HpcError", "no")}])
def test_a_pool_that_is_down_or_held_does_not_grow(known):
    """What waits has been told so."""
    assert _scaled(pool("0:3", known=known), demand=Demand(9, 0, NOW - 100)).desired == 0


def test_an_idle_replica_is_released_the_one_with_the_least_walltime_left_first():
    """Half an hour by default; those that are busy, or were used, stay."""
    of = pool("1:4", desired=4)
    long, short = (replica(name, used=NOW - 1801, ends=ends) for name, ends in (("l", NOW + 900), ("s", NOW + 300)))
    busy, used = replica("b", _R.BUSY, used=NOW - 9999, ends=NOW), replica("u", used=NOW - 1799, ends=NOW)
    scaled = _scaled(of, long, short, busy, used)
    assert (scaled.desired, scaled.idle) == (3, short)
    assert _scaled(of, busy, used).idle is None


def test_a_pools_own_idle_time_counts_and_its_least_number_stays():
    """Down to zero where zero is the least."""
    idle = replica("a", used=NOW - 61)
    assert _scaled(pool("0:1", desired=1, idle="1m"), idle).desired == 0
    assert _scaled(pool("0:1", desired=1, idle="2m"), idle).desired == 1
    assert _scaled(pool("1:2", idle="1m"), idle).desired == 1


def test_nobody_is_released_while_requests_wait():
    """They may wait for a replica with more time left, or will be leased in a moment."""
    assert _scaled(pool("0:1", desired=1), replica("a", used=0.0), demand=Demand(1, 0, NOW)).idle is None


def test_a_released_replica_ends_for_being_idle():
    """And for nothing else: people see it."""
    idle = replica("a", used=NOW - 1801)
    decision = decided(pool("0:1", desired=1), idle)
    assert decision.desired == 0
    assert decision.steps == (Release(idle, EndCause.IDLE, "nobody has used it for the pool's idle time"),)


def test_a_successor_of_an_idle_replica_goes_with_it():
    """At the same time; one that was left behind goes, too."""
    heir = replica("b", _R.PENDING, succeeds="a", begin=NOW + 10)
    idle, gone = replica("a", used=0.0), replica("a", _R.DRAINING, drain=True)
    assert [step.replica for step in decided(pool("0:1", desired=1), idle, heir).steps] == [idle, heir]
    assert [step.replica for step in decided(pool("0:1", desired=0), gone, heir).steps] == [heir]


def test_of_too_many_those_go_first_that_are_least_far():
    """A waiting job before a loading one, a loading one before one that serves, the younger before the older."""
    of = pool(1)
    order = [
        replica("young", _R.PENDING, submitted=NOW),
        replica("old", _R.PENDING),
        replica("loads", _R.LOADING),
        replica("short", ends=NOW + 10),
        replica("long", ends=NOW + 900),
    ]
    released = [step.replica for step in decided(of, *reversed(order)).steps if isinstance(step, Release)]
    assert released == order[:-1]


_states = st.sampled_from([_R.SUBMITTED, _R.PENDING, _R.STARTING, _R.LOADING, _R.READY, _R.BUSY, _R.DRAINING])


@st.composite
def situations(draw):
    """A pool, some replicas, successors among them, and what is asked."""
    least = draw(st.integers(0, 3))
    most = draw(st.integers(max(1, least), 4))
    known = {"load_seconds": draw(st.sampled_from([None, 10.0])), "gap": draw(st.sampled_from(["", "no"]))}
    known["held"] = draw(st.sampled_from([None, ErrorReport("HpcError", "no")]))
    down = draw(st.booleans())
    of = pool(f"{least}:{most}", desired=0 if down else draw(st.integers(0, 5)), known={**known, "down": down})
    names = [f"r{number}" for number in range(draw(st.integers(0, 5)))]
    replicas, free = [], []  # those that have no successor
    for name in names:
        succeeds = draw(st.sampled_from(["", *free]))
        free = [*(one for one in free if one != succeeds), name]
        replicas.append(
            replica(
                name,
                draw(_states),
                drain=draw(st.booleans()),
                until=draw(st.sampled_from([None, NOW - 1, NOW + 1])),
                succeeds=succeeds,
                begin=draw(st.sampled_from([None, NOW - 1, NOW + 100])),
                ends=draw(st.sampled_from([None, NOW + 30, NOW + 3000])),
                used=draw(st.sampled_from([NOW, NOW - 9999])),
            )
        )
    queued = draw(st.integers(0, 30))
    demand = Demand(queued, draw(st.integers(0, 2)), NOW - draw(st.integers(0, 60)) if queued else None)
    return of, replicas, demand


@given(situations())
def test_whatever_there_is_no_decision_asks_for_too_much(situation):
    """Wanted are at least the least and at most the most; never more jobs than are missing, never two successors of one."""
    of, replicas, demand = situation
    decision = decided(of, *replicas, demand=demand)
    if not of.down:
        assert of.spec.least <= decision.desired <= of.spec.most
    released = [step.replica for step in decision.steps if not isinstance(step, Submit)]
    staying = [one for one in wanted(of, replicas) if one not in released]
    new = [step for step in decision.steps if isinstance(step, Submit)]
    extra = [step for step in new if not step.succeeds]
    heirs = [step.succeeds for step in new if step.succeeds] + [one.status.succeeds for one in staying]
    assert not new or not (of.down or of.held)
    assert len(extra) <= max(0, decision.desired - len(primaries(wanted(of, replicas))) + len(released))
    assert len(primaries(staying)) + len(extra) <= max(decision.desired, len(primaries(wanted(of, replicas))))
    assert all(heirs.count(step.succeeds) == 1 for step in new if step.succeeds)
    assert len(released) == len({one.id for one in released})


@given(situations())
def test_a_decision_that_is_carried_out_leaves_nothing_to_submit(situation):
    """What was decided for the same moment is enough: a second look submits no more of what the first did."""
    of, replicas, demand = situation
    first = decided(of, *replicas, demand=demand)
    gone = {step.replica.id for step in first.steps if not isinstance(step, Submit)}
    kept = [one for one in replicas if one.id not in gone]
    new = [
        replica(f"n{number}", _R.SUBMITTED, succeeds=step.succeeds, begin=step.begin)
        for number, step in enumerate(step for step in first.steps if isinstance(step, Submit))
    ]
    settled = pool(of.spec.replicas, desired=first.desired, known={"down": of.down, "held": of.held, "gap": of.gap})
    second = decided(settled, *kept, *new)
    assert [step for step in second.steps if isinstance(step, Submit) and not step.succeeds] == []
