"""All rules together, over time: a pool comes to what it is to be, whatever befalls its jobs."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from nnsight_hpc.daemon.backlog import Demand
from tests.daemon.known import pool
from tests.daemon.simulation import Simulation

_events = st.lists(st.tuples(st.sampled_from(["crash", "ask", "rest"]), st.integers(5, 400)), max_size=10)


@settings(max_examples=40, deadline=None)
@given(events=_events, least=st.integers(0, 2), succession=st.sampled_from(["overlap", "gap"]))
def test_a_pool_follows_its_queue_and_comes_to_rest(events, least, succession):
    """While jobs crash and requests come and go there are never more than wanted; in the end the least serve."""
    of = pool(f"{least}:3", time="00:30:00", idle="5m", succession=succession)
    cluster = Simulation(of, load=20, wait=5, growth=1, poll=40, step=5)
    for event, seconds in events:
        if event == "crash":
            cluster.crash()
        else:
            cluster.demand = Demand(20, 1, cluster.now - 60) if event == "ask" else Demand()
        cluster.run(until=lambda: False, seconds=seconds)
    cluster.demand = Demand()
    settled = cluster.run(until=lambda: cluster.pool.desired == least == len(cluster.serving()), seconds=4000)
    assert (cluster.pool.desired, len(cluster.serving())) == (least, least), settled
    assert cluster.most_extra == 0
    assert cluster.most_jobs <= 2 * 3 + 1


def test_requests_that_keep_waiting_bring_one_replica_after_the_other():
    """Up to the most, and when they have gone, down to the least."""
    cluster = Simulation(pool("0:3", time="12:00:00", idle="5m"), load=20, wait=5, growth=1, poll=40, step=1)
    cluster.demand = Demand(20, 0, cluster.now)
    cluster.run(until=lambda: len(cluster.serving()) == 2, seconds=120)
    assert (len(cluster.serving()), cluster.pool.desired) == (2, 3)
    cluster.run(until=lambda: len(cluster.serving()) == 3, seconds=120)
    assert len(cluster.serving()) == 3
    cluster.demand = Demand()
    cluster.run(until=lambda: not cluster.serving(), seconds=400)
    assert (cluster.serving(), cluster.pool.desired) == ([], 0)
