"""Dumps that several workers write, and dumps that wait: what a real daemon tells simulated workers."""

from __future__ import annotations

import itertools
import threading
from urllib.parse import quote

import pytest

from nnsight_hpc.wire.dumps import DumpStatus
from nnsight_hpc.wire.errors import Conflict, ErrorReport, HpcError
from nnsight_hpc.wire.messages import DumpProgress, RequestStatus, decode
from nnsight_hpc.wire.names import new_request_id, part_id
from nnsight_hpc.wire.states import EndCause, ReplicaState, RequestState
from nnsight_hpc.wire.workers import (
    EndRecord,
    Lease,
    Orders,
    Outcome,
    SliceAsk,
    SliceGiven,
    SliceProgress,
    SlicesOpened,
)
from tests.daemon.process import DaemonProcess, Worker, dump_frame, send, wait_for

_Q = RequestState


class Writer:
    """One of two workers of a pool, and what it does with the dump that it has, or helps with."""

    def __init__(self, daemon: DaemonProcess, replica: str) -> None:
        self.worker = Worker(daemon, replica)
        self.replica = replica
        self.worker.register()
        self.worker.report(ReplicaState.READY)

    def lease(self, wait: float = 30) -> Lease | None:
        self.held = self.worker.lease(wait)
        if self.held:
            self.worker.started(self.held)
        return self.held

    def open(self, slices: int, *written: int) -> None:
        counts = DumpProgress(tokens=10 * len(written), tokens_total=10 * slices)
        self.worker.post(self._path("slices"), SlicesOpened(slices=slices, written=written, progress=counts))

    def next(self, written: int | None = None, *, begun: int | None = None, wait: float = 0) -> SliceGiven:
        done = None if written is None else SliceProgress(slice=written, tokens=10)
        path = f"{self._path('slice')}&wait={wait}"
        return self.worker.post(path, SliceAsk(written=done, begun=begun), SliceGiven)

    def tell(self, number: int, tokens: int) -> Orders:
        path = self._path("progress")
        return self.worker.post(path, SliceProgress(slice=number, tokens=tokens, speed=5.0), Orders)

    def orders(self, wait: float = 0) -> Orders:
        return self.worker.post(f"/w1/orders?replica={self.replica}&wait={wait}", None, Orders)

    def end(self, **how: object) -> None:
        self.worker.outcome(Outcome(id=self.held.id, attempt=self.held.attempt, seconds=1.0, **how))

    def _path(self, what: str) -> str:
        return f"/w1/{what}?replica={self.replica}&id={quote(self.held.id)}"


class Scene:
    """A daemon, and a pool of two workers of which the first leads a dump of the given name."""

    def __init__(self, daemon: DaemonProcess, name: str, slices: int = 4) -> None:
        self.daemon, self.http, self.name, self.request = daemon, daemon.people(), name, new_request_id()
        daemon.up(name, replicas=2)
        self.lead, self.help = (Writer(daemon, one.id) for one in daemon.replicas(name, count=2))
        self.http.put(f"/v1/datasets/{name}?pool={name}&request={self.request}", dump_frame(name), RequestStatus)
        assert self.lead.lease().kind == "dump"
        self.lead.open(slices)

    def status(self) -> RequestStatus:
        return self.http.get(f"/v1/requests/{self.request}", RequestStatus)

    def until(self, state: RequestState) -> RequestStatus:
        return wait_for(lambda: (found := self.status()).state == state and found)

    def dump(self) -> DumpStatus:
        return self.http.get(f"/v1/dumps/{self.name}", DumpStatus)

    def tell(self, what: str) -> DumpStatus:
        return decode(self.http.call("POST", f"/v1/dumps/{self.name}/{what}"), DumpStatus)


_numbers = itertools.count()


@pytest.fixture
def scene(daemon):
    """A dump of a name of its own for each test."""
    name = f"d{next(_numbers)}"
    yield Scene(daemon, name)
    daemon.people().call("DELETE", f"/v1/pools/{name}")


def test_an_idle_worker_is_given_a_part(scene):
    """It shares the slices with the worker that has the dump, leaves when none waits, and the dump is complete after all."""
    part = scene.help.lease()
    assert (part.kind, part.id) == ("part", part_id(scene.request, scene.help.replica))
    assert [scene.lead.next().slice, scene.help.next().slice] == [0, 1]
    scene.lead.tell(0, 4)
    scene.help.tell(1, 6)
    progress = scene.status().progress
    assert (progress.tokens, progress.tokens_total, progress.workers, progress.speed) == (10, 40, 2, 10.0)
    found = scene.dump()
    assert [(one.replica, one.slice, one.tokens) for one in found.doing] == sorted(
        [(scene.lead.replica, 0, 4), (scene.help.replica, 1, 6)]
    )
    assert [scene.lead.next(0).slice, scene.help.next(1).slice, scene.lead.next(2).slice] == [2, 3, None]
    assert scene.help.next(3) == SliceGiven(complete=True, leave=True)
    scene.help.end()
    assert scene.lead.next() == SliceGiven(complete=True)
    scene.lead.end(result=b"r", result_bytes=1)
    progress = scene.until(_Q.COMPLETED).progress
    assert (progress.tokens, progress.workers) == (40, 0)


def test_a_worker_that_waits_for_others_is_told_when_they_have_written(scene):
    """Its question is held, and answered as soon as the last slice is written or comes back."""
    scene.help.lease()
    for number in range(3):
        assert scene.lead.next(number - 1 if number else None).slice == number
    assert scene.help.next().slice == 3
    answers: list[SliceGiven] = []
    asks = threading.Thread(target=lambda: answers.append(scene.lead.next(2, wait=30)))
    asks.start()
    scene.help.end(gave_way=True)
    asks.join(120)
    assert answers == [SliceGiven(slice=3)]


def test_a_part_that_fails_or_is_lost_costs_the_dump_nothing(scene):
    """Its slice comes back, the dump goes on, no attempt is counted; the replica is not given a part of that dump again."""
    scene.help.lease()
    assert [scene.lead.next().slice, scene.help.next().slice] == [0, 1]
    scene.help.end(error=ErrorReport("HpcError", "no GPU today"))
    assert scene.help.lease(0) is None
    story = scene.http.call("GET", f"/v1/requests/{scene.request}/story").decode()
    assert "no GPU today" in story
    assert [scene.lead.next(number).slice for number in (0, 2, 3)] == [2, 3, 1]
    assert scene.status().state in (_Q.LEASED, _Q.RUNNING)


def test_what_a_worker_that_ends_has_begun_is_given_to_others(scene):
    """Its job has ended: the dump's own worker is given that slice at last, and nothing has happened to the request."""
    scene.help.lease()
    assert [scene.lead.next().slice, scene.help.next().slice] == [0, 1]
    end = EndRecord(replica=scene.help.replica, cause=EndCause.CRASHED, detail="killed")
    scene.help.worker.post("/w1/end", end)
    assert [scene.lead.next(number).slice for number in (0, 2, 3)] == [2, 3, 1]
    assert scene.lead.next(1) == SliceGiven(complete=True)
    assert scene.status().state in (_Q.LEASED, _Q.RUNNING)


def test_a_part_gives_way_to_a_request(scene):
    """Of two workers that write, the one that helps is told to let it go first, and gives its slice back."""
    scene.help.lease()
    assert [scene.lead.next().slice, scene.help.next().slice] == [0, 1]
    send(scene.http, run := new_request_id(), scene.name)
    assert scene.help.orders(30).give_way == (scene.help.held.id,)
    assert scene.lead.orders().give_way == ()
    assert scene.help.next() == SliceGiven(leave=True)
    scene.help.end(gave_way=True)
    assert scene.help.lease().id == run
    scene.help.worker.finish(scene.help.held)
    assert scene.help.lease().kind == "part"
    assert [scene.help.next(begun=1).slice, scene.lead.next(0).slice] == [1, 2]


def test_parts_go_on_while_the_dump_changes_hands(scene):
    """Its worker gives way; the part writes on; the next attempt goes on with what the part has left."""
    scene.help.lease()
    assert [scene.lead.next().slice, scene.help.next().slice] == [0, 1]
    scene.lead.end(gave_way=True)
    assert scene.lead.lease().kind == "dump"
    assert scene.help.next(1).slice == 2
    assert [scene.lead.next(begun=0).slice, scene.lead.next(0).slice] == [0, 3]


def test_the_next_daemon_learns_who_writes_what(daemon_with):
    """It knows nothing of slices; the part that it hears of is taken up, and what that has begun is not given again."""
    daemon = daemon_with()
    scene = Scene(daemon, "smol")
    scene.help.lease()
    assert [scene.lead.next().slice, scene.help.next().slice] == [0, 1]
    daemon.kill()
    daemon.start()
    scene.http = daemon.people()
    for one in (scene.lead, scene.help):
        one.worker.reconnect()
        one.worker.report(ReplicaState.BUSY, running=(one.held.id,))
    assert scene.lead.next(0).known is False
    scene.lead.open(4, 0)
    scene.help.tell(1, 5)
    assert [scene.lead.next(0).slice, scene.help.next().slice] == [2, 1]
    send(scene.http, new_request_id(), "smol")
    assert scene.help.orders(30).give_way == (scene.help.held.id,)


def test_a_paused_dump_waits_and_goes_on(daemon_with):
    """All that write it stop, it is given to nobody, also by the next daemon; resumed it goes on; other requests run."""
    daemon = daemon_with()
    scene = Scene(daemon, "smol")
    scene.help.lease()
    assert [scene.lead.next().slice, scene.help.next().slice] == [0, 1]
    assert scene.tell("pause").request.paused
    for one in (scene.lead, scene.help):
        assert one.orders(30).give_way == (one.held.id,)
        one.end(gave_way=True)
    status = scene.until(_Q.QUEUED)
    assert (status.paused, status.position) == (True, None)
    daemon.kill()
    daemon.start()
    scene.http = daemon.people()
    for one in (scene.lead, scene.help):
        one.worker.reconnect()
        one.worker.report(ReplicaState.READY)
        assert one.lease(0) is None
    send(scene.http, run := new_request_id(), "smol")
    assert scene.lead.lease().id == run
    scene.lead.worker.finish(scene.lead.held)
    assert not scene.tell("resume").request.paused
    assert scene.lead.lease().id == scene.request
    scene.lead.end(result=b"r", result_bytes=1)
    with pytest.raises(Conflict, match="has ended"):
        scene.tell("pause")


def test_parts_of_a_cancelled_dump_stop(scene):
    """Once the dump has ended nobody may write it: who helps is told to give up, and asks in vain."""
    scene.help.lease()
    assert [scene.lead.next().slice, scene.help.next().slice] == [0, 1]
    scene.http.call("DELETE", f"/v1/requests/{scene.request}")
    scene.lead.end(cancelled=True)
    scene.until(_Q.CANCELLED)
    assert scene.help.orders(30).cancel == (scene.help.held.id,)
    with pytest.raises(HpcError):
        scene.help.open(4)
    scene.help.end(cancelled=True)
    assert scene.help.lease(0) is None
