"""The order of what waits for a pool: fair among users, each user's own by priority and by its coming."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from nnsight_hpc.daemon.queues import Order, Queue, Waiting

USERS = ("ada", "bob", "cyd")
ONES = st.builds(
    Waiting,
    behind=st.integers(-2, 2),
    sequence=st.just(0),
    id=st.just(""),
    pool=st.just("p"),
    user=st.sampled_from(USERS),
    kind=st.sampled_from(["run", "run", "dump"]),
    since=st.just(0.0),
    needs=st.just(0.0),
    batch=st.sampled_from(["", "x", "y"]),
    tokens=st.integers(1, 9),
)
COSTS = st.fixed_dictionaries(dict.fromkeys(USERS, st.floats(0, 10) | st.just(0.0)))
ORDERS = st.builds(Order, COSTS, st.sampled_from([0.001, 0.1, 1.0, 3.0]))


def _queue(ones) -> tuple[Queue, list[Waiting]]:
    queue = Queue()
    ones = [one._replace(sequence=number, id=f"r-{number}") for number, one in enumerate(ones)]
    for one in ones:
        queue.add(one)
    return queue, ones


def _served(ones: list[Waiting], order: Order) -> list[Waiting]:
    """One after another: the first of whoever has had least, who has then had a step more."""
    left, had, served = list(ones), dict.fromkeys(USERS, 0), []
    while left:
        firsts = [min(one for one in left if one.user == user) for user in {one.user for one in left}]
        one = min(firsts, key=lambda one: (order.cost[one.user] + had[one.user] * order.step, one.sequence))
        had[one.user] += 1
        left.remove(one)
        served.append(one)
    return served


@given(st.lists(ONES, max_size=25), ORDERS)
def test_the_order_is_that_of_serving_who_has_had_least(ones, order):
    """Runs and dumps each, and a request's position is how many that order has before it, runs before all dumps."""
    queue, ones = _queue(ones)
    runs, dumps = (_served([one for one in ones if (one.kind == "dump") == dump], order) for dump in (False, True))
    assert runs == list(queue.runs.in_order(order))
    assert dumps == list(queue.dumps.in_order(order))
    assert list(range(len(ones))) == [queue.before(one, order) for one in (*runs, *dumps)]


@given(st.lists(ONES, max_size=25), ORDERS, st.sets(st.integers(0, 24)), st.sampled_from(USERS))
def test_what_left_and_who_is_barred_is_not_there(ones, order, gone, barred):
    """The order is that of the rest, in the whole queue and in each batch."""
    queue, ones = _queue(ones)
    for number in gone:
        queue.remove(f"r-{number}")
    order = order._replace(barred=frozenset({barred}))
    rest = [one for one in ones if one.sequence not in gone and one.user != barred and one.kind == "run"]
    assert _served(rest, order) == list(queue.runs.in_order(order))
    for one in (one for one in rest if one.batch):
        others = [other for other in _served([r for r in rest if r.batch == one.batch], order) if other != one]
        found = [other for other in queue.companions(one, order, lambda _: True) if other.kind == "run"]
        assert set(others) == set(found)


@given(st.lists(ONES, max_size=25), ORDERS, st.integers(1, 5))
def test_what_does_not_fit_costs_its_user_no_turn(ones, order, most):
    """Of those that fit the order is as if there were no others."""
    queue, ones = _queue(ones)
    fitting = [one for one in ones if one.tokens <= most and one.kind == "run"]
    assert _served(fitting, order) == list(queue.runs.in_order(order, lambda one: one.tokens <= most))


def test_priorities_count_among_ones_own_only():
    """A user's larger priority goes before his own others, and before nobody else's."""
    ones = [
        Waiting(-priority, number, f"r-{number}", "p", user, "run", 0.0, 0.0, "", 1)
        for number, (user, priority) in enumerate(itertools.product(("ada", "bob"), (0, 5)))
    ]
    queue = Queue()
    for one in ones:
        queue.add(one)
    found = queue.runs.in_order(Order({"ada": 1.0, "bob": 0.0}, 0.1))
    assert [(one.user, one.behind) for one in found] == [("bob", -5), ("bob", 0), ("ada", -5), ("ada", 0)]
