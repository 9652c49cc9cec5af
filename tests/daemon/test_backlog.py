"""How many requests wait and run for each pool, counted as they move."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from nnsight_hpc.daemon.backlog import Backlog, Demand
from nnsight_hpc.daemon.table import Row
from nnsight_hpc.wire.states import RequestState

_WAITING, _HELD = (RequestState.QUEUED,), (RequestState.LEASED, RequestState.RUNNING)


def _row(request: str, pool: str, state: RequestState, moment: float) -> Row:
    known = {"id": request, "pool": pool, "state": state, "times": {state: moment}, "sequence": int(request[2:])}
    return Row(
        **{
            **dict.fromkeys(Row.__struct_fields__),
            "user": f"u{int(request[2:]) % 3}",
            "kind": "run",
            "priority": 0,
            "batch": "",
            **known,
        }
    )


@given(
    st.lists(st.tuples(st.integers(0, 5), st.sampled_from(RequestState), st.floats(0, 1e9)), max_size=40),
)
def test_the_demand_is_that_of_the_states_as_they_are(moves):
    """After any moves it is what counting all requests anew gives, for each pool by itself."""
    backlog, rows = Backlog(), {}
    for number, state, moment in moves:
        rows[number] = _row(f"r-{number}", f"pool-{number % 2}", state, moment)
        backlog.note(rows[number])
    for pool in ("pool-0", "pool-1"):
        mine = [row for row in rows.values() if row.pool == pool]
        waiting = [row.times[RequestState.QUEUED] for row in mine if row.state in _WAITING]
        running = sum(row.state in _HELD for row in mine)
        assert backlog.demand(pool) == Demand(len(waiting), running, min(waiting, default=None))
        assert (pool in backlog.pools()) == bool(waiting)
    mine = [row.user for row in rows.values() if row.state in _WAITING]
    assert +backlog.users == Counter(mine)
    old = {row.id for row in rows.values() if row.state in _WAITING and row.times[row.state] < 5e8}
    assert sorted(old) == sorted(backlog.older(5e8))
