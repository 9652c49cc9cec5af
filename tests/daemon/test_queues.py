"""The order of what waits for a pool: fair among users, each user's own by priority and by its coming."""

from __future__ import annotations

import itertools
from dataclasses import replace
from math import inf

from hypothesis import given
from hypothesis import strategies as st

from nnsight_hpc.daemon.queues import Queue
from nnsight_hpc.daemon.shares import Usage
from nnsight_hpc.daemon.turns import Order, Waiting

USERS = ("ada", "bob", "cyd")
ONES = st.builds(
    Waiting,
    behind=st.integers(-2, 2),
    sequence=st.just(0),
    id=st.just(""),
    pool=st.just("p"),
    user=st.sampled_from(USERS),
    kind=st.sampled_from(["run", "run", "dump"]),
    since=st.floats(0, 100),
    needs=st.sampled_from([0.0, 0.0, 60.0, 3600.0]),
    batch=st.sampled_from(["", "x", "y"]),
    tokens=st.integers(1, 9),
)
SECONDS = st.integers(0, 640).map(lambda number: number / 64)
EACH = st.fixed_dictionaries(dict.fromkeys(USERS, SECONDS))
NOW = 1e9
ORDERS = st.builds(
    lambda had, running, step: Order(
        {user: Usage(each, NOW) for user, each in had.items()}, running, NOW, 3600.0, step
    ),
    EACH,
    EACH,
    st.sampled_from([0.001, 0.1, 1.0, 3.0]),
)


def _queue(ones) -> tuple[Queue, list[Waiting]]:
    queue = Queue()
    ones = [one._replace(sequence=number, id=f"r-{number}") for number, one in enumerate(ones)]
    for one in ones:
        queue.add(one)
    return queue, ones


def _served(ones: list[Waiting], order: Order) -> list[Waiting]:
    """One after another: the first of whoever has had least, who has then had a step more."""
    left, gone, served = list(ones), dict.fromkeys(USERS, 0), []
    while left:
        firsts = [min(one for one in left if one.user == user) for user in {one.user for one in left}]
        one = min(firsts, key=lambda one: (order.due(one.user, gone[one.user]), one.sequence))
        gone[one.user] += 1
        left.remove(one)
        served.append(one)
    return served


@given(st.lists(ONES, max_size=25), ORDERS)
def test_the_order_is_that_of_serving_who_has_had_least(ones, order):
    """Runs and dumps each, and a request's position is how many that order has before it, runs before all dumps."""
    queue, ones = _queue(ones)
    runs, dumps = (_served([one for one in ones if (one.kind == "dump") == dump], order) for dump in (False, True))
    assert [*runs, *dumps] == list(queue.in_order(order))
    assert list(range(len(ones))) == [queue.before(one, order) for one in (*runs, *dumps)]


@given(st.lists(ONES, max_size=25), ORDERS, st.sets(st.integers(0, 24)), st.sampled_from(USERS))
def test_what_left_and_who_is_barred_is_not_there(ones, order, gone, barred):
    """The order is that of the rest, in the whole queue and in each batch; the oldest is the oldest of the rest."""
    queue, ones = _queue(ones)
    for number in gone:
        queue.remove(f"r-{number}")
    there = [one for one in ones if one.sequence not in gone]
    assert (len(queue), queue.oldest) == (len(there), min((one.since for one in there), default=None))
    assert {one.id for one in there if one.since < 50} == set(queue.older(50))
    order = replace(order, barred=frozenset({barred}))
    rest = [one for one in there if one.user != barred and one.kind == "run"]
    assert _served(rest, order) == list(queue.runs.in_order(order))
    for one in (one for one in rest if one.batch):
        others = [other for other in _served([r for r in rest if r.batch == one.batch], order) if other != one]
        found = [other for other in queue.companions(one, order, inf) if other.kind == "run"]
        assert set(others) == set(found)


@given(st.lists(ONES, max_size=25), st.lists(st.tuples(st.sampled_from(USERS), SECONDS, ONES), max_size=25))
def test_the_order_follows_what_users_have(ones, later):
    """However often they have had more, and more has come, between two looks: it is that of what they have had by then."""
    queue, ones = _queue(ones)
    usage: dict[str, Usage] = {}
    for now, (user, seconds, one) in enumerate(later, start=int(NOW)):
        order = Order(dict(usage), {}, now, 3600.0, 1.0)
        assert _served([one for one in ones if one.kind == "run"], order) == list(queue.runs.in_order(order))
        usage[user] = Usage(usage.get(user, Usage()).at(now, 3600.0) + seconds, now)
        ones.append(one._replace(sequence=now, id=f"r-{now}"))
        queue.add(ones[-1])


@given(st.lists(ONES, max_size=25), ORDERS, st.sampled_from([0.0, 100.0]))
def test_what_does_not_fit_costs_its_user_no_turn(ones, order, most):
    """Of those that fit the order is as if there were no others."""
    queue, ones = _queue(ones)
    fitting = [one for one in ones if one.needs <= most and one.kind == "run"]
    assert _served(fitting, order) == list(queue.runs.in_order(order, most))


def test_priorities_count_among_ones_own_only():
    """A user's larger priority goes before his own others, and before nobody else's."""
    ones = [
        Waiting(-priority, number, f"r-{number}", "p", user, "run", 0.0, 0.0, "", 1)
        for number, (user, priority) in enumerate(itertools.product(("ada", "bob"), (0, 5)))
    ]
    queue = Queue()
    for one in ones:
        queue.add(one)
    found = queue.runs.in_order(Order({"ada": Usage(1.0, NOW)}, {}, NOW, 3600.0, 0.1))
    assert [(one.user, one.behind) for one in found] == [("bob", -5), ("bob", 0), ("ada", -5), ("ada", 0)]
