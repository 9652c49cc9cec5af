"""Lists of requests: what they show to whom, page by page, at a cost that does not grow with all that there is."""

from __future__ import annotations

import asyncio
import itertools
import json
from contextlib import asynccontextmanager

import pytest

from nnsight_hpc.daemon import table
from nnsight_hpc.daemon.changes import Changes
from nnsight_hpc.daemon.config import Config
from nnsight_hpc.daemon.database import connect, take_over
from nnsight_hpc.daemon.pools import Pools
from nnsight_hpc.daemon.request_views import RequestViews
from nnsight_hpc.daemon.requests import Requests
from nnsight_hpc.daemon.store import Store
from nnsight_hpc.daemon.story import Stories
from nnsight_hpc.wire.errors import InvalidInput, NotFound
from nnsight_hpc.wire.messages import RequestStatus
from nnsight_hpc.wire.names import new_request_id
from nnsight_hpc.wire.places import places_at
from nnsight_hpc.wire.pools import PoolSpec, Status
from nnsight_hpc.wire.states import RequestState
from tests.daemon.process import send

_Q = RequestState
USERS, POOLS = ("ada", "bob"), ("p", "q")


def _insert(connection, number: int, state: RequestState) -> str:
    """A request of one user after the other for one pool after the other."""
    name = f"r-{number:012d}"
    user, pool = USERS[number % 2], POOLS[number // 2 % 2]
    known = {"id": name, "kind": "run", "pool": pool, "state": state, "user": user, "times": {state: 1.0 + number}}
    held = {"replica": "p-1", "attempt": 1} if state in (_Q.LEASED, _Q.RUNNING) else {}
    table.insert(connection, **known, fingerprint="", dataset="", dump=None, **held)
    return name


@asynccontextmanager
async def _views(tmp_path, states):
    """The views of a daemon that has just started with requests in these states, and the ids of these."""
    places = places_at(tmp_path)
    places.requests.mkdir()
    config = Config(executor="slurm", places=places)
    store, changes = Store(take_over(places, 1), lambda: None), Changes()
    try:
        stories = Stories(store)
        pools = Pools(store, changes, config, stories)
        for pool in POOLS:
            await pools.put(PoolSpec(name=pool, model="m"))
        ids = await store.run(lambda c: [_insert(c, number, state) for number, state in enumerate(states)])
        requests = Requests(store, changes, pools, config)
        await requests.load()
        yield RequestViews(store, changes, pools, requests, stories), ids
    finally:
        await store.close()


@pytest.mark.parametrize("user", [None, "ada"])
def test_an_overview_has_some_of_each_kind(tmp_path, user):
    """What workers have, what goes next and what has ended last, of one user or of all, with the true positions."""
    states = [*[_Q.COMPLETED] * 12, *[_Q.RUNNING] * 2, *[_Q.QUEUED] * 16, _Q.FAILED, _Q.CANCELLED]

    async def scenario() -> None:
        async with _views(tmp_path, states) as (views, _):
            everything = [one for one in await views.overview(None, 100) if user in (None, one.user)]
            shown = await views.overview(user, 3)
            kinds = [(lambda s: s in ("LEASED", "RUNNING")), (lambda s: s == "QUEUED"), (lambda s: s.ended)]
            held, waiting, ended = ([one for one in everything if kind(one.state)] for kind in kinds)
            next_ones = sorted(waiting, key=lambda one: (one.position, one.times["QUEUED"]))[:3]
            expected = {one.id for one in (*held[-3:], *next_ones, *ended[-3:])}
            assert expected == {one.id for one in shown}
            assert [one for one in everything if one.id in expected] == shown
            assert len(everything) == (len(states) if user is None else len(states) // 2)

    asyncio.run(scenario())


@pytest.mark.parametrize("user", [None, "bob"])
def test_pages_together_are_all(tmp_path, user):
    """Each request is on one page, in the order of coming, whatever its state; a page of some states has no others."""
    states = list(itertools.islice(itertools.cycle(state for state in _Q if state != _Q.RECEIVED), 50))

    async def scenario() -> None:
        async with _views(tmp_path, states) as (views, ids):
            expected = ids if user is None else ids[1::2]
            before, found = "", []
            while page := await views.page(tuple(_Q), user, 7, before):
                found = [*(one.id for one in page), *found]
                before = page[0].id
            assert expected == found
            some = await views.page((_Q.FAILED, _Q.EXPIRED), user, 100, "")
            wanted = {name for name, state in zip(ids, states, strict=True) if state in (_Q.FAILED, _Q.EXPIRED)}
            assert [name for name in expected if name in wanted] == [one.id for one in some]

    asyncio.run(scenario())


def test_a_page_costs_what_it_shows(tmp_path):
    """SQLite takes as many steps for a page among 20,000 requests as among 200, also where few are in its states."""

    def steps(connection, **asked) -> int:
        count = itertools.count()
        connection.set_progress_handler(lambda: next(count) < 0, 10)
        table.page(connection, **asked, limit=20)
        connection.set_progress_handler(None, 0)
        return next(count)

    asked = [
        {"states": states, "user": user}
        for states, user in itertools.product([table.ENDED, (_Q.RUNNING,), (_Q.QUEUED,), tuple(_Q)], [None, "ada"])
    ]
    connection = connect(take_over(places_at(tmp_path), 1))
    connection.execute("BEGIN")
    for number in range(200):
        _insert(connection, number, _Q.COMPLETED if number % 3 else _Q.QUEUED)
    few = [steps(connection, **one) for one in asked]
    for number in range(200, 20_000):
        _insert(connection, number, _Q.QUEUED)
    many = [steps(connection, **one) for one in asked]
    connection.close()
    assert all(after <= 1.5 * before + 10 for after, before in zip(many, few, strict=True)), (few, many)


def test_lists_over_http(daemon, worker):
    """`limit`, `state` and `before` of the list, and `limit` of the status; what is no state is refused with those that are."""
    http, ids = daemon.people(), [new_request_id() for _ in range(5)]
    for name in ids:
        send(http, name)
    for name in ids[:2]:
        http.call("DELETE", f"/v1/requests/{name}")

    def listed(query: str) -> list[str]:
        return [one.id for one in http.get(f"/v1/requests?{query}", list[RequestStatus])]

    assert listed("") == ids
    assert listed("limit=1") == ids[1:3]
    assert listed("state=QUEUED,QUEUED&limit=2") == ids[3:]
    assert listed(f"state=QUEUED,CANCELLED&limit=2&before={ids[3]}") == ids[1:3]
    assert [one.id for one in http.get("/v1/status?limit=1", Status).requests] == ids[1:3]
    assert json.loads(http.call("GET", "/v1/status?limit=0"))["requests"] == []
    with pytest.raises(InvalidInput, match="state=DONE") as caught:
        listed("state=DONE")
    assert "COMPLETED" in caught.value.why
    with pytest.raises(NotFound):
        listed("before=r-aaaaaaaaaaaa")
    for name in ids:
        http.call("DELETE", f"/v1/requests/{name}")
