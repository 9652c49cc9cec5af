"""The queue as people and workers meet it, over both interfaces: priorities, batches, dumps that give way, quotas, ends."""

from __future__ import annotations

import time

import pytest

from nnsight_hpc.wire.errors import Conflict, InvalidInput, NotFound
from nnsight_hpc.wire.messages import RequestStatus
from nnsight_hpc.wire.names import new_request_id
from nnsight_hpc.wire.states import EndCause, ReplicaState, RequestState
from nnsight_hpc.wire.workers import EndRecord, Orders, Outcome
from tests.daemon.process import LONG, dump_frame, run_frame, send, wait_for


def _send(daemon, query: str = "", frame: bytes | None = None) -> str:
    name = new_request_id()
    daemon.people().put(f"/v1/requests/{name}?pool=smol{query}", frame or run_frame(), RequestStatus)
    return name


def _dump(daemon, name: str) -> str:
    request = new_request_id()
    daemon.people().put(f"/v1/datasets/{name}?pool=smol&request={request}", dump_frame(name), RequestStatus)
    return request


def _status(daemon, request: str) -> RequestStatus:
    return daemon.people().get(f"/v1/requests/{request}", RequestStatus)


def test_a_larger_priority_goes_first(daemon, worker):
    """Positions say so while they wait; anything but a whole number within the limits is refused."""
    low, high, usual = (_send(daemon, query) for query in ("&priority=-5", "&priority=7", ""))
    assert [_status(daemon, name).position for name in (low, high, usual)] == [2, 0, 1]
    shown = {one.id: one.position for one in daemon.people().get("/v1/requests", list[RequestStatus])}
    assert [shown[name] for name in (low, high, usual)] == [2, 0, 1]
    for name in (high, usual, low):
        lease = worker.lease()
        assert lease.id == name
        worker.finish(lease)
    for wrong in ("101", "-101", "1.5", "high"):
        with pytest.raises(InvalidInput, match="priority="):
            _send(daemon, f"&priority={wrong}")


def test_requests_of_one_form_are_leased_together(daemon, worker):
    """As many as asked for, within the tokens; an exclusive one alone; each has an outcome of its own."""
    alike, alone = [_send(daemon) for _ in range(4)], _send(daemon, "&exclusive=1")
    first = worker.leases(most=3, tokens=100)
    assert [lease.id for lease in first] == alike[:3]
    assert first == worker.leases(most=3, tokens=100)  # the answer was lost
    assert {first[0].batch} == {lease.batch for lease in first} != {""}
    for lease in first:
        worker.started(lease)
    second = worker.leases(most=3, tokens=4)
    assert [lease.id for lease in second] == alike[3:]
    worker.started(second[0])
    [third] = worker.leases(most=3)
    assert (third.id, third.batch) == (alone, "")
    for lease in (*first[1:], *second, third):
        worker.finish(lease)
    worker.outcome(Outcome(id=first[0].id, attempt=1, cancelled=True))
    states = [_status(daemon, name).state for name in (*alike, alone)]
    assert states == [RequestState.CANCELLED] + [RequestState.COMPLETED] * 4


def test_what_was_lost_in_company_runs_alone_next_time(daemon_with):
    """A crash of a forward that several shared is no fault of one of them, and shows which it is if it happens again."""
    daemon = daemon_with(retry=0.05)
    daemon.up()
    worker, names = daemon.worker(), [_send(daemon) for _ in range(2)]
    for lease in worker.leases(most=2):
        worker.started(lease)
    worker.post("/w1/end", EndRecord(replica=worker.replica, cause=EndCause.CRASHED, detail="it fell"))
    for crash in range(2):
        worker = wait_for(lambda known=worker.replica: daemon.newest().id != known and daemon.worker())
        [lease] = worker.leases(most=2)
        assert (lease.id, lease.batch) == (names[0], "")
        worker.started(lease)
        worker.post("/w1/end", EndRecord(replica=worker.replica, cause=EndCause.CRASHED, detail=f"again {crash}"))
    assert (_status(daemon, names[0]).state, _status(daemon, names[1]).state) == ("FAILED", "QUEUED")


def test_a_dump_gives_way_and_goes_on(daemon, worker):
    """Its worker is told as soon as a run waits, the run is next, and no attempt is counted against the dump."""
    dump = _dump(daemon, "patient")
    for attempt in range(1, 6):
        lease = worker.lease()
        assert (lease.id, lease.attempt) == (dump, attempt)
        worker.started(lease)
        assert Orders() == worker.post(f"/w1/orders?replica={worker.replica}&wait=0", None, Orders)
        run = _send(daemon)
        orders = worker.post(f"/w1/orders?replica={worker.replica}&wait={LONG}", None, Orders)
        assert Orders(give_way=(dump,)) == orders
        worker.outcome(Outcome(id=dump, attempt=attempt, gave_way=True, seconds=0.5))
        assert _status(daemon, dump).state == RequestState.QUEUED
        [other] = worker.leases(most=4)
        assert other.id == run
        worker.finish(other)
    lease = worker.lease()
    worker.finish(lease)
    assert _status(daemon, dump).state == RequestState.COMPLETED


def test_a_dump_that_was_cancelled_does_not_come_back(daemon, worker):
    """Its worker let others go first as it was cancelled: that is its end."""
    dump = _dump(daemon, "given-up")
    lease = worker.lease()
    worker.started(lease)
    daemon.people().call("DELETE", f"/v1/requests/{dump}")
    worker.outcome(Outcome(id=dump, attempt=1, gave_way=True))
    assert _status(daemon, dump).state == RequestState.CANCELLED


def test_a_start_is_estimated_from_what_requests_took(daemon, worker):
    """Nothing is known before one has run; after that it follows from the position and from what runs."""
    first = _send(daemon)
    lease = worker.lease()
    worker.outcome(Outcome(id=lease.id, attempt=1, error=None, seconds=100.0, result_bytes=0))
    assert lease.id == first
    running = _send(daemon)
    begun = time.time()
    [now] = _starts(daemon, running)
    assert begun <= now <= time.time()
    lease = worker.lease()
    waiting = [_send(daemon) for _ in range(2)]
    begun = time.time()
    next_one, last = _starts(daemon, *waiting)
    took = last - next_one
    assert took > 5
    assert begun - 1 <= next_one - took <= time.time() + 1
    worker.finish(lease)
    for _ in waiting:
        worker.finish(worker.lease())


def _starts(daemon, *requests: str) -> list[float]:
    """When each is expected to start, by one answer."""
    shown = {one.id: one for one in daemon.people().get("/v1/requests", list[RequestStatus])}
    return [shown[name].starts for name in requests]


def test_an_id_stands_for_its_bytes(daemon, worker, request_id):
    """The same again is the same request; other bytes under its id are refused, and change nothing."""
    send(daemon.people(), request_id)
    assert send(daemon.people(), request_id).state == RequestState.QUEUED
    with pytest.raises(Conflict, match="other content"):
        send(daemon.people(), request_id, frame=run_frame("aaa"))
    worker.finish(worker.lease())
    assert send(daemon.people(), request_id).state == RequestState.COMPLETED


def test_what_has_waited_too_long_expires(daemon_with):
    """It ends with the reason, its bytes are removed, and its result says why there is none."""
    daemon = daemon_with(expires=0.3)
    daemon.up()
    name = _send(daemon)
    ended = wait_for(lambda: (found := _status(daemon, name)).state.ended and found)
    assert (ended.state, "has waited" in ended.error.what) == (RequestState.EXPIRED, True)
    assert not list(daemon.places.requests.iterdir())
    with pytest.raises(Exception, match="has waited"):
        daemon.people().call("GET", f"/v1/requests/{name}/result")


def test_the_oldest_results_make_room(daemon_with):
    """Over a user's quota they are removed, not the newest; what was asked of them stays known, also after a restart."""
    daemon = daemon_with(result_bytes_per_user=250)
    daemon.up()
    worker, names = daemon.worker(), [_send(daemon) for _ in range(3)]
    for number in range(3):
        worker.finish(worker.lease(), b"x" * 100)
        if number == 1:
            daemon.stop()
            daemon.start()
            worker.reconnect()
            worker.register()
            worker.report(ReplicaState.READY)
    with pytest.raises(NotFound, match="no result"):
        daemon.people().call("GET", f"/v1/requests/{names[0]}/result")
    for name in names[1:]:
        assert daemon.people().call("GET", f"/v1/requests/{name}/result") == b"x" * 100
    assert (_status(daemon, names[0]).state, "room" in _status(daemon, names[0]).note) == (RequestState.COMPLETED, True)
