"""What becomes of requests whose workers are lost, and of those that take longer than a replica has left."""

from __future__ import annotations

import secrets
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnsight_hpc.daemon import table
from nnsight_hpc.daemon.database import connect, take_over
from nnsight_hpc.daemon.losses import Loss, lose
from nnsight_hpc.daemon.refusals import needs_error
from nnsight_hpc.wire.errors import InvalidInput
from nnsight_hpc.wire.messages import RequestStatus, Story
from nnsight_hpc.wire.names import new_request_id
from nnsight_hpc.wire.places import places_at
from nnsight_hpc.wire.states import EndCause, ReplicaState, RequestState
from nnsight_hpc.wire.workers import EndRecord
from tests.daemon.process import DaemonProcess, Worker, dump_frame, run_frame, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

BLAMELESS = [cause for cause in EndCause if cause.blameless]
BLAMED = [cause for cause in EndCause if not cause.blameless]


# -- one loss, in the database -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """Make a request that is held: its state, since when it runs, which attempt it is, how many workers it has ended."""
    connection = connect(take_over(places_at(tmp_path_factory.mktemp("home")), 1))
    connection.execute("BEGIN")  # and no end: nothing need be on the disk

    def make(
        *, ran: float | None, attempt: int = 1, kills: int = 0, kind: str = "run", needs: float = 0.0
    ) -> table.Row:
        columns = {"id": new_request_id(), "kind": kind, "pool": "p", "user": "u", "fingerprint": "", "dataset": ""}
        row = table.insert(connection, **columns, state=RequestState.QUEUED, times={}, dump=None, needs=needs)
        row = table.move_to(connection, row, RequestState.LEASED, replica="p-1", attempt=attempt)
        if ran is not None:
            row = table.move_to(connection, row, RequestState.RUNNING)
            row = table.update(connection, row, times={**row.times, RequestState.RUNNING: time.time() - ran})
        return table.update(connection, row, kills=kills)

    make.lose = lambda row, cause, *, listened=0.0: lose(connection, row, Loss("why", cause, 3, 1000.0, listened))
    yield make
    connection.close()


@pytest.mark.parametrize("cause", BLAMED)
def test_a_request_that_ended_two_workers_is_not_tried_again(held, cause):
    """The first end counts, the second one fails it with that reason; a request that had not begun has ended nothing."""
    first = held.lose(held(ran=1), cause)
    assert (first.state, first.kills) == (RequestState.QUEUED, 1)
    second = held.lose(held(ran=1, kills=1, attempt=2), cause)
    assert (second.state, second.error.kind, second.error.why) == (RequestState.FAILED, "ReplicaFailed", "why")
    assert "two replicas ended" in second.error.what
    assert held.lose(held(ran=None, kills=1), cause).state == RequestState.QUEUED


@pytest.mark.parametrize("cause", BLAMELESS)
def test_an_end_that_is_nobodys_fault_counts_as_an_attempt_only(held, cause):
    """The request is queued until it was tried as often as is configured."""
    lost = held.lose(held(ran=1, kills=1, attempt=2), cause)
    assert (lost.state, lost.kills) == (RequestState.QUEUED, 1)
    assert "tried 3 times" in held.lose(held(ran=1, attempt=3), cause).error.what


@pytest.mark.parametrize("cause", BLAMELESS)
def test_a_dump_goes_on_as_often_as_it_takes(held, cause):
    """It continues where it was, so an end that is nobody's fault costs it nothing, and teaches nothing about its length."""
    lost = held.lose(held(ran=999, attempt=50, kind="dump"), cause)
    assert (lost.state, lost.needs) == (RequestState.QUEUED, 0.0)
    assert held.lose(held(ran=1, kills=1, attempt=2, kind="dump"), EndCause.CRASHED).state == RequestState.FAILED


@given(st.floats(0, 2000), st.floats(0, 900))
def test_what_the_walltime_cut_off_is_tried_where_there_is_more_time(held, ran, needs):
    """It needs half as much again as it had, and never less than was known; all that a replica can give is no guess."""
    begun = time.time()
    lost = held.lose(held(ran=ran, needs=needs), EndCause.WALLTIME)
    later = ran + time.time() - begun  # it was lost at some time until now
    if ran >= 900:
        assert (lost.state, lost.error.kind) == (RequestState.FAILED, "InvalidInput")
    elif later < 900:
        assert lost.state == RequestState.QUEUED
        least, most = (max(needs, min(1.5 * seconds, 900)) for seconds in (ran, later))
        assert least - 1e-3 <= lost.needs <= most + 1e-3
        assert needs_error("p", lost.needs, 1000.0) is None


def test_only_the_walltime_teaches_how_long_a_request_takes(held):
    """What another end cut off may have been about to finish."""
    for cause in EndCause:
        lost = held.lose(held(ran=100), cause)
        assert lost.needs == (pytest.approx(190, abs=41) if cause == EndCause.WALLTIME else 0.0)  # 150, and a while


def test_nothing_is_learnt_of_what_ran_while_nobody_listened(held):
    """It may have been done long before its outcome could be told to anybody: it is only queued again."""
    lost = held.lose(held(ran=950), EndCause.WALLTIME, listened=time.time() - 100)
    assert (lost.state, lost.needs) == (RequestState.QUEUED, 0.0)


# -- with a daemon and workers -----------------------------------------------------------------------------------------


class Service:
    """A pool of its own for a test, and workers that are its replicas one after another."""

    def __init__(self, daemon: DaemonProcess, **given: str) -> None:
        self.http, self.pool = daemon.people(), f"p-{secrets.token_hex(2)}"
        self._daemon, self._last = daemon, ""
        daemon.up(self.pool, **given)

    def worker(self) -> Worker:
        """A ready worker of a replica that there was not before."""
        wait_for(lambda: self._daemon.newest(self.pool).id != self._last)
        self._last = self._daemon.newest(self.pool).id
        return self._daemon.worker(self.pool)

    def grow(self) -> None:
        self._daemon.up(self.pool, replicas=2)

    def send(self, query: str = "") -> str:
        name = new_request_id()
        self.http.put(f"/v1/requests/{name}?pool={self.pool}{query}", run_frame(), RequestStatus)
        return name

    def status(self, name: str) -> RequestStatus:
        return self.http.get(f"/v1/requests/{name}", RequestStatus)


@pytest.fixture(scope="module")
def quick() -> Iterator[DaemonProcess]:
    """A daemon that replaces replicas at once."""
    folder = Path(tempfile.mkdtemp(prefix="d-"))
    with DaemonProcess(folder, retry=0.05) as daemon:
        yield daemon
    shutil.rmtree(folder)


@pytest.fixture
def service(quick) -> Service:
    return Service(quick)


def _end(worker: Worker, cause: EndCause, detail: str = "so it was") -> None:
    worker.post("/w1/end", EndRecord(replica=worker.replica, cause=cause, detail=detail))


def test_a_request_is_failed_by_the_second_worker_that_it_crashes(service):
    """Workers that end as they run it: two, never a third, though three attempts are configured; the story has both."""
    name = service.send()
    for _ in range(2):
        worker = service.worker()
        worker.started(worker.lease())
        _end(worker, EndCause.CRASHED, "segmentation fault")
    failed = service.status(name)
    assert (failed.state, failed.error.kind, failed.error.why.endswith("segmentation fault")) == (
        RequestState.FAILED,
        "ReplicaFailed",
        True,
    )
    assert service.worker().lease(wait=0.2) is None
    story = service.http.get(f"/v1/requests/{name}/story", Story)
    assert sum("segmentation fault" in event.text for event in story.events) == 2


def test_a_signal_gives_requests_back_at_once_and_counts_no_kill(service):
    """Preempted or cancelled, the replica takes nothing new, and what it held is in the queue; why, Slurm will say."""
    worker, name = service.worker(), service.send()
    worker.started(worker.lease())
    _end(worker, EndCause.CANCELLED, "SIGTERM")
    status = service.status(name)
    assert (status.state, "SIGTERM" in status.note) == (RequestState.QUEUED, True)
    assert worker.lease(wait=0) is None
    assert service.worker().lease().attempt == 2


def test_a_request_goes_to_a_replica_that_has_time_for_it(service):
    """One that needs more than a replica has left is passed over for a later one, says what it waits for, and is not lost."""
    worker = service.worker()
    worker.report(ReplicaState.READY, ends=time.time() + 60)
    long, short = service.send("&needs=57"), service.send()  # of 60 s, 5 are spare
    waiting = service.status(long)
    assert (waiting.needs, "more time left" in waiting.waits_for) == (57.0, True)
    lease = worker.lease()
    assert lease.id == short
    worker.finish(lease)
    assert worker.lease(wait=0.2) is None
    service.grow()
    other = service.worker()
    assert service.status(long).waits_for == ""
    assert other.lease().id == long


def test_nothing_is_begun_in_the_last_seconds_of_a_walltime(service):
    """A request that says nothing of its length is not started to be killed at once."""
    worker = service.worker()
    worker.report(ReplicaState.READY, ends=time.time() + 4)
    service.send()
    assert worker.lease(wait=0.2) is None
    service.grow()
    assert service.worker().lease().attempt == 1


@pytest.mark.parametrize(("cause", "left"), [(EndCause.WALLTIME, 100), (EndCause.CANCELLED, 1)])
def test_the_end_of_a_walltime_teaches_what_a_request_needs(service, cause, left):
    """Cut off while it ran, it goes where there is more time than it had, also when all that the job saw was a signal."""
    worker, name = service.worker(), service.send()
    worker.started(worker.lease())
    time.sleep(0.5)
    worker.report(ReplicaState.BUSY, running=(name,), ends=time.time() + left)
    _end(worker, cause)
    status = service.status(name)
    assert (status.state, 0.75 <= status.needs < 100) == (RequestState.QUEUED, True)


def test_a_dump_outlives_more_walltimes_than_a_request_has_attempts(service):
    """Each replica goes on where the last one was, so a walltime that ends is no failure of it."""
    name = new_request_id()
    service.http.put(f"/v1/datasets/long?pool={service.pool}&request={name}", dump_frame("long"), RequestStatus)
    for attempt in (1, 2, 3, 4):
        worker = service.worker()
        lease = worker.lease()
        assert lease.attempt == attempt
        worker.started(lease)
        _end(worker, EndCause.WALLTIME)
    assert service.status(name).state == RequestState.QUEUED


@pytest.mark.parametrize("needs", ["soon", "-1", "nan"])
def test_needs_is_a_number_of_seconds(service, needs):
    """Anything else is refused."""
    with pytest.raises(InvalidInput, match="needs="):
        service.send(f"&needs={needs}")


def test_a_request_that_takes_longer_than_a_walltime_is_not_kept_waiting(daemon_with):
    """It is refused when it comes, or fails as soon as a load has shown how little is left after it."""
    daemon = daemon_with(executor="slurm", poll=(0.2, 0.3))  # but for the jobs: a walltime counts
    service = Service(daemon, time="00:00:20")
    with pytest.raises(InvalidInput, match="of its walltime"):
        service.send("&needs=16")
    name = service.send("&needs=14")
    wait_for(lambda: daemon.newest(service.pool).started)
    time.sleep(1.5)
    service.worker()
    failed = service.status(name)
    assert (failed.state, "14 s" in failed.error.why) == (RequestState.FAILED, True)
