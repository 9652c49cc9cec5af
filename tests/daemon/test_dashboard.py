"""What the dashboard is told: what each user may see, at a change and not before, and no more than a page holds."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import threading
import time
from pathlib import Path

import pytest

from nnsight_hpc.daemon.counters import SPAN, STEP, Recent
from nnsight_hpc.daemon.dashboard_api import PACE
from nnsight_hpc.daemon.database import connect
from nnsight_hpc.wire.dashboard import PAGE, Dashboard
from nnsight_hpc.wire.errors import InvalidInput, NotFound
from nnsight_hpc.wire.names import new_request_id
from nnsight_hpc.wire.states import ReplicaState, RequestState
from nnsight_hpc.wire.workers import Outcome
from tests.daemon.others import people_as
from tests.daemon.process import DaemonProcess, send, wait_for

_Q = RequestState


@pytest.fixture(scope="module")
def daemon():
    """A daemon that is shared with the users games and man, where root runs the tests."""
    folder = Path(tempfile.mkdtemp(prefix="d-"))
    daemon = DaemonProcess(folder)
    daemon.places.home.mkdir(parents=True)
    if os.geteuid() == 0:
        daemon.places.settings.write_text('[share]\nusers = ["games", "man"]\n')
    with daemon:
        yield daemon
        daemon.stop()
    shutil.rmtree(folder, ignore_errors=True)


def shown(http, seen: str = "", wait: float = 0) -> Dashboard:
    return http.get(f"/v1/dashboard?seen={seen}&wait={wait}", Dashboard)


@pytest.mark.skipif(os.geteuid() != 0, reason="is other users")
def test_of_others_requests_only_the_owner_sees_more_than_numbers(daemon, worker):
    """Two others have requests: each sees his own and how many go before it, and no word of the rest."""
    owner = daemon.people()
    games, man = (people_as(Path(daemon.lease().socket), user) for user in ("games", "man"))
    ids = {user: [new_request_id() for _ in range(2)] for user in ("games", "man")}
    for http, user in ((games, "games"), (man, "man")):
        for request in ids[user]:
            send(http, request)
    for http, user, other in ((games, "games", "man"), (man, "man", "games")):
        words = re.findall(r"[\w-]+", http.call("GET", "/v1/dashboard").decode())  # whole: an id may have "man" in it
        assert {other, *ids[other]} & {*words} == set()
        found = shown(http)
        assert [(one.id, one.user, one.state) for one in found.own] == [(id_, user, _Q.QUEUED) for id_ in ids[user]]
        assert (found.owner, found.queue, found.users, found.daemon.user) == (False, (), (), user)
        assert (found.queued, found.own_queued, found.pools[0].queued) == (4, 2, 4)
    places = sorted(one.before for http in (games, man) for one in shown(http).own)
    assert places == [0, 1, 2, 3]
    found = shown(owner)
    assert (found.owner, found.own, found.own_queued) == (True, (), 0)
    assert sorted(one.id for one in found.queue) == sorted(ids["games"] + ids["man"])
    assert [one.before for one in found.queue] == [0, 1, 2, 3]
    assert {(load.user, load.queued, load.running) for load in found.users} == {("games", 2, 0), ("man", 2, 0)}
    for http, user in ((games, "games"), (man, "man")):
        for request in ids[user]:
            http.call("DELETE", f"/v1/requests/{request}")


def test_a_request_goes_through_its_states_and_each_is_told(daemon, worker):
    """Whoever has seen the last one is answered at the change, whatever it is; what has ended counts as throughput."""
    people, request = daemon.people(), new_request_id()
    before = shown(people)
    send(people, request)
    states = [(found := shown(people, before.version, 20)).own[0].state]
    lease = worker.lease()
    states.append((found := shown(people, found.version, 20)).own[0].state)
    worker.started(lease)
    states.append((found := shown(people, found.version, 20)).own[0].state)
    worker.outcome(Outcome(id=lease.id, attempt=lease.attempt, error=InvalidInput("<b>no</b>\nmore").report()))
    found = shown(people, found.version, 20)
    assert (states, found.own[0].state) == ([_Q.QUEUED, _Q.LEASED, _Q.RUNNING], _Q.FAILED)
    assert (found.own[0].error, found.own[0].before, found.running) == ("<b>no</b>", None, 0)
    assert sum(one.count for one in found.ended) == 1 + sum(one.count for one in before.ended)


def test_pools_are_told_with_their_replicas(daemon, worker):
    """State, bytes, walltime and how many serve; a change of a replica is told as that of a request is."""
    people = daemon.people()
    before = shown(people)
    worker.report(ReplicaState.READY, loaded=100, total=200, free=300, ends=time.time() + 1e6)
    pool = shown(people, before.version, 20).pools[0]
    replica = pool.replicas[0]
    assert (pool.name, pool.model, pool.desired) == ("smol", "org/model", 1)
    assert (replica.id, replica.state) == (worker.replica, ReplicaState.READY)
    assert (replica.loaded, replica.total, replica.free) == (100, 200, 300)
    assert 0 < 1e6 - (replica.ends - time.time()) < 60


def test_without_news_the_answer_comes_when_the_wait_is_over(daemon):
    """With the same version."""
    people = daemon.people()
    wait_for(lambda: shown(people, version := shown(people).version, 1).version == version)  # a successor is submitted


def test_a_busy_daemon_tells_a_watcher_once_a_second_at_most(daemon, worker):
    """While requests come one after the other, whatever their number."""
    people, watcher, done, answers = daemon.people(), daemon.people(), threading.Event(), []
    begun, first = time.monotonic(), shown(watcher).version

    def watch() -> None:
        seen = first
        while not (answers and done.is_set()):
            seen = shown(watcher, seen, 1).version
            answers.append(seen)

    thread = threading.Thread(target=watch)
    thread.start()
    ids = [new_request_id() for _ in range(30)]
    for request in ids:
        send(people, request)
    for request in ids:
        people.call("DELETE", f"/v1/requests/{request}")
    done.set()
    thread.join()
    assert answers[0] != first
    assert len(answers) <= (time.monotonic() - begun) / PACE + 1


def test_ten_thousand_queued_requests_do_not_make_a_large_page(base):
    """What goes first is sent, and numbers for the rest; it is as large with ten thousand as with a hundred."""
    with DaemonProcess(base) as daemon:
        daemon.up()
        send(daemon.people(), first := new_request_id())
        daemon.stop()
    _copy_request(daemon, first, 9_999)
    with daemon:
        found = shown(daemon.people())
        assert (found.queued, found.own_queued, found.users[0].queued) == (10_000, 10_000, 10_000)
        assert [one.before for one in found.own] == list(range(50)) == [one.before for one in found.queue]
        assert len(daemon.people().call("GET", "/v1/dashboard")) < 50_000
        daemon.stop()


def _copy_request(daemon: DaemonProcess, request: str, times: int) -> None:
    """As if it had been sent so many times more; the daemon does not run."""
    connection = connect(max(daemon.places.home.glob("daemon-*.sqlite")))
    row = dict(connection.execute("SELECT * FROM requests WHERE id = ?", (request,)).fetchone())
    del row["sequence"]
    names = ", ".join(row)
    marks = ", ".join(f":{name}" for name in row)
    connection.execute("BEGIN")
    connection.executemany(
        f"INSERT INTO requests ({names}) VALUES ({marks})", [{**row, "id": new_request_id()} for _ in range(times)]
    )
    connection.execute("COMMIT")
    connection.close()


def test_the_page_has_these_files_and_no_others(daemon):
    """Each is given as it lies in the package; what else lies there or elsewhere is not."""
    for name in PAGE:
        assert len(daemon.people().call("GET", f"/v1/dashboard/{name}")) > 500
    for name in ("__init__.py", "..%2fdashboard.py", "%2fetc%2fpasswd"):
        with pytest.raises(NotFound):
            daemon.people().call("GET", f"/v1/dashboard/{name}")


def test_what_has_ended_is_counted_by_steps_and_forgotten():
    """As many steps are kept as the span has, and those from a moment on are given."""
    recent = Recent()
    for when in (0.0, STEP - 1, STEP, 3 * STEP):
        recent.add(when)
    assert recent.since(0) == [(0, 2), (STEP, 1), (3 * STEP, 1)]
    assert recent.since(STEP + 1) == [(STEP, 1), (3 * STEP, 1)]
    for step in range(int(SPAN / STEP)):
        recent.add(SPAN * 2 + step * STEP)
    assert len(recent.since(0)) == SPAN / STEP
    assert recent.since(0)[0] == (SPAN * 2, 1)
