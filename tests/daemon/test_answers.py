"""A request that is sent and waited for in one call: what it is answered, and when."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING

import pytest

from nnsight_hpc.daemon import table
from nnsight_hpc.daemon.changes import Changes
from nnsight_hpc.daemon.config import Config
from nnsight_hpc.daemon.database import take_over
from nnsight_hpc.daemon.new_request import NewRequest
from nnsight_hpc.daemon.pools import Pools
from nnsight_hpc.daemon.request_views import SMALL_RESULT
from nnsight_hpc.daemon.requests import Requests
from nnsight_hpc.daemon.store import Store
from nnsight_hpc.daemon.story import Stories
from nnsight_hpc.wire.errors import Conflict, NotFound
from nnsight_hpc.wire.frames import unpack
from nnsight_hpc.wire.messages import RequestLog, RequestStatus, Story, decode
from nnsight_hpc.wire.names import new_request_id
from nnsight_hpc.wire.places import places_at
from nnsight_hpc.wire.pools import PoolSpec
from nnsight_hpc.wire.states import EndCause, RequestState
from nnsight_hpc.wire.workers import Begun, Outcome
from tests.daemon.process import LONG, run_frame, send, wait_for

if TYPE_CHECKING:
    from nnsight_hpc.wire.workers import Lease
    from tests.daemon.process import DaemonProcess, Worker


def answer(daemon: DaemonProcess, request: str, wait: float = LONG, frame: bytes = b"") -> tuple[RequestLog, bytes]:
    """Send a request by POST: what it had said, how it stood, and its result, if that came too."""
    path = f"/v1/requests/{request}?pool=smol&wait={wait}"
    log, result = unpack(daemon.people().call("POST", path, frame or run_frame(), timeout=LONG + 30))
    return decode(log, RequestLog), bytes(result)


class Asking(threading.Thread):
    """Somebody who sends a request and waits for its answer."""

    def __init__(self, daemon: DaemonProcess, request: str, wait: float = LONG) -> None:
        super().__init__()
        self._ask = lambda: answer(daemon, request, wait)
        self.start()

    def run(self) -> None:
        self._log, self._result = self._ask()

    def answer(self) -> tuple[RequestLog, bytes]:
        self.join()
        return self._log, self._result


def test_the_answer_comes_with_the_result(daemon, worker, request_id):
    """As soon as the request has ended: nobody asks again, whatever its state was in between."""
    asking = Asking(daemon, request_id)
    lease = worker.lease()
    worker.started(lease)
    worker.finish(lease, b"values")
    log, result = asking.answer()
    assert (log.status.id, log.status.state, log.complete, result) == (request_id, "COMPLETED", True, b"values")


def test_a_large_result_is_left_to_be_asked_for(daemon, worker, request_id):
    """The daemon does not hold it."""
    asking, large = Asking(daemon, request_id), bytes(SMALL_RESULT + 1)
    worker.finish(worker.lease(), large)
    log, result = asking.answer()
    assert (log.complete, result) == (True, b"")
    assert daemon.people().call("GET", f"/v1/requests/{request_id}/result") == large


def test_a_result_that_is_not_as_it_was_written_is_not_given(daemon, worker, request_id):
    """Who asks for it is told so."""
    asking = Asking(daemon, request_id)
    lease = worker.lease()
    worker.outcome(Outcome(id=lease.id, attempt=lease.attempt, result_bytes=17))
    assert asking.answer()[1] == b""


def test_the_answer_comes_with_the_first_line(daemon, worker, request_id):
    """The rest is read on from there."""
    asking = Asking(daemon, request_id)
    lease = worker.lease()
    say(worker, lease, b'{"text":"hello"}\n')
    log, result = asking.answer()
    assert ([line.text for line in log.lines], log.complete, result) == (["hello"], False, b"")
    worker.finish(lease)
    rest = daemon.people().get(f"/v1/requests/{request_id}/log?from={log.next}&wait=0", RequestLog)
    assert (rest.lines, rest.complete) == ((), True)


def say(worker: Worker, lease: Lease, lines: bytes) -> None:
    worker.post(f"/w1/log?replica={worker.replica}&id={lease.id}&attempt={lease.attempt}&at=0", lines)


def test_the_answer_says_that_it_waits(daemon, worker, request_id):
    """After so many seconds, where nothing has happened; the request is stored by then."""
    log, result = answer(daemon, request_id, wait=0.01)
    assert (log.status.state, log.complete, result) == (RequestState.QUEUED, False, b"")
    worker.finish(worker.lease())


def test_what_is_sent_again_is_the_same_request(daemon, worker, request_id):
    """Who lost his connection sends it again: he waits on, or has the result at once, and it runs once."""
    asking = Asking(daemon, request_id)
    again = Asking(daemon, request_id)
    worker.finish(worker.lease(), b"values")
    later = answer(daemon, request_id)
    assert {asking.answer()[1], again.answer()[1], later[1]} == {b"values"}
    assert worker.lease(0.01) is None
    with pytest.raises(Conflict, match="other content"):
        answer(daemon, request_id, frame=run_frame(fingerprint="other"))


def test_a_request_that_ends_otherwise_is_answered_at_once(daemon, worker, request_id):
    """Cancelled by somebody else, it says so."""
    asking = Asking(daemon, request_id)
    wait_for(lambda: daemon.people().get(f"/v1/requests/{request_id}", RequestStatus))
    daemon.people().call("DELETE", f"/v1/requests/{request_id}")
    log, result = asking.answer()
    assert (log.status.state, log.complete, result) == (RequestState.CANCELLED, True, b"")


def test_what_is_refused_is_refused_at_once(daemon, request_id):
    """As by PUT."""
    with pytest.raises(NotFound, match="no pool"):
        daemon.people().call("POST", f"/v1/requests/{request_id}?pool=none&wait={LONG}", run_frame(), timeout=LONG)


def test_a_daemon_that_stops_answers_those_who_wait(daemon_with, request_id):
    """They go on with the next one, which knows the request."""
    daemon = daemon_with()
    daemon.up()
    asking = Asking(daemon, request_id)
    wait_for(lambda: daemon.people().get(f"/v1/requests/{request_id}", RequestStatus))
    assert daemon.stop() == 0
    assert asking.answer()[0].status.state == RequestState.QUEUED
    daemon.start()
    worker = daemon.worker()
    asking = Asking(daemon, request_id)
    worker.finish(worker.lease(), b"values")
    assert asking.answer()[1] == b"values"


# -- what is written down of a short request --------------------------------------------------------------------------


def test_that_a_request_runs_is_written_down_unless_it_has_ended(daemon, worker):
    """A worker's word that it has begun may come after the one how it ended, and changes nothing then."""
    short, longer = (f"r-{name:a<12}" for name in ("short", "longer"))
    send(daemon.people(), short)
    lease = worker.lease()
    worker.finish(lease)
    worker.started(lease)
    send(daemon.people(), longer)
    lease = worker.lease()
    worker.started(lease)
    assert [state(daemon, name) for name in (short, longer)] == [RequestState.COMPLETED, RequestState.RUNNING]
    worker.finish(lease)
    assert ["it runs" in told(daemon, name) for name in (short, longer)] == [False, True]


def state(daemon: DaemonProcess, request: str) -> RequestState:
    return daemon.people().get(f"/v1/requests/{request}", RequestStatus).state


def told(daemon: DaemonProcess, request: str) -> list[str]:
    return [event.text for event in daemon.people().get(f"/v1/requests/{request}/story", Story).events]


def test_who_is_lost_in_that_moment_is_lost_while_the_request_runs(tmp_path):
    """It may be what ended him: it is known of a request that has just begun, though it is not written down yet."""
    places = places_at(tmp_path)
    places.requests.mkdir()
    config = Config(executor="slurm", places=places)

    async def scenario() -> table.Row:
        store, changes = Store(take_over(places, 1), lambda: None), Changes()
        try:
            pools = Pools(store, changes, config, Stories(store))
            requests = Requests(store, changes, pools, config)
            await pools.put(PoolSpec(name="p", model="m"))
            name = new_request_id()
            await requests.accept(NewRequest(id=name, kind="run", pool="p", user="u", received=1.0))
            [lease] = await requests.lease("p", "p-1")
            telling = asyncio.create_task(requests.starts.started("p-1", [Begun(id=name, attempt=lease.attempt)]))
            await asyncio.sleep(0)
            await requests.take_back([name], "its worker is gone", EndCause.CRASHED)
            await telling
            return await store.run(lambda c: table.get(c, name))
        finally:
            await store.close()

    row = asyncio.run(scenario())
    assert (row.state, row.kills) == (RequestState.QUEUED, 1)
