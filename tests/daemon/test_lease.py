"""One daemon a home: who wins, who yields, and what a daemon does that has lost its lease."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from nnsight_hpc.client.launch import open_socket
from nnsight_hpc.wire.errors import Conflict, HpcError, Unreachable
from nnsight_hpc.wire.files import write_atomically
from nnsight_hpc.wire.http import HttpClient
from nnsight_hpc.wire.messages import Hello, LeaseRecord, RequestStatus, encode
from nnsight_hpc.wire.names import new_request_id
from nnsight_hpc.wire.pools import PoolStatus, Status
from nnsight_hpc.wire.states import ReplicaState, RequestState
from nnsight_hpc.wire.workers import Outcome
from tests.daemon.process import DaemonProcess, Worker, send, wait_for

QUICK = {"lease_touch": 0.5, "lease_stale": 6.0}
SLEEP = 6.5
"""Seconds after which a daemon that was stopped has lost its lease."""


def test_of_several_daemons_that_race_one_wins(base):
    """Three start at once: one serves, the others end with the exit code of a conflict and say who has it."""
    daemon = DaemonProcess(base)
    processes = [daemon.spawn() for _ in range(3)]
    wait_for(lambda: sum(p.poll() is None for p in processes) == 1)
    (daemon.process,) = (p for p in processes if p.poll() is None)
    assert sorted(p.returncode for p in processes if p.returncode is not None) == [5, 5]
    assert wait_for(lambda: daemon.people().get("/v1/hello", Hello)).pid == daemon.process.pid
    assert daemon.log().count("a daemon already runs on") == 2
    assert daemon.stop() == 0


def test_of_several_that_race_for_a_dead_daemons_lease_one_wins(daemon_with):
    """Whoever finds it dead at the same moment: one takes over, the others say who has it, and nothing is lost."""
    daemon, name = daemon_with(), new_request_id()
    daemon.up()
    send(daemon.people(), name)
    daemon.kill()
    processes = [daemon.spawn() for _ in range(3)]
    wait_for(lambda: sum(p.poll() is None for p in processes) == 1)
    (daemon.process,) = (p for p in processes if p.poll() is None)
    assert sorted(p.returncode for p in processes if p.returncode is not None) == [5, 5]
    hello = wait_for(lambda: daemon.people().get("/v1/hello", Hello))
    assert (hello.pid, daemon.log().count("a daemon already runs on")) == (daemon.process.pid, 2)
    assert daemon.people().get(f"/v1/requests/{name}", RequestStatus).state == RequestState.QUEUED


def test_a_killed_daemons_lease_is_taken_over_at_once(daemon_with):
    """Its process is dead on this host: nobody waits for the lease to grow stale, and the epoch grows."""
    daemon = daemon_with()
    daemon.kill()
    assert daemon.start().lease().epoch == 2


@pytest.mark.parametrize(("age", "taken"), [(10, False), (100, True)])
def test_a_lease_of_another_host_counts_until_it_is_stale(base, age, taken):
    """The age of lease.json decides, since nobody can see processes of another host."""
    daemon = DaemonProcess(base)
    daemon.places.home.mkdir(parents=True)
    foreign = LeaseRecord(epoch=7, host="login2", pid=os.getpid(), nonce="n", socket="/nowhere")
    write_atomically(daemon.places.lease, encode(foreign))
    os.utime(daemon.places.lease, (time.time() - age,) * 2)
    if taken:
        assert daemon.start().lease().epoch == 8
        assert daemon.stop() == 0
    else:
        process = daemon.spawn()
        assert process.wait(120) == 5
        assert "login2" in daemon.log()
        assert daemon.lease() == foreign


def test_a_claim_whose_daemon_died_does_not_block(base):
    """A daemon that was killed between its claim and its lease costs an epoch, nothing more."""
    daemon = DaemonProcess(base)
    daemon.places.home.mkdir(parents=True)
    dead = LeaseRecord(epoch=1, host=socket.gethostname(), pid=2**22 - 3, nonce="n", socket="/nowhere", started=1.0)
    write_atomically(daemon.places.home / "lease-1.claim", encode(dead))
    assert daemon.start().lease().epoch == 2
    assert daemon.stop() == 0


@pytest.mark.slow
def test_a_lease_is_kept_while_the_database_is_taken_over(base):
    """A start that takes longer than a lease lasts ends with a daemon that takes requests on."""
    with DaemonProcess(base, **QUICK, copying=SLEEP) as daemon:
        wait_for(daemon.up)
        assert wait_for(lambda: send(daemon.people(), new_request_id())).state == RequestState.QUEUED


@pytest.mark.slow
def test_a_daemon_that_slept_takes_nothing_on_and_ends(base):
    """Stopped for longer than its lease lasts, it acknowledges no request, and ends when it finds its successor.

    It may end before it is asked; what is acknowledged then is its successor's word, and lies in its queue.
    """
    with DaemonProcess(base, **QUICK) as old:
        wait_for(old.up)
        http, first, second = old.people(), new_request_id(), new_request_id()
        http.get("/v1/hello", Hello)  # the connection that it keeps
        _stop(old)
        time.sleep(SLEEP)
        with DaemonProcess(base, **QUICK) as new:
            assert new.lease().epoch == 2
            wait_for(lambda: send(new.people(), first))
            old.process.send_signal(signal.SIGCONT)
            acknowledged = False
            with suppress(HpcError):
                acknowledged = send(http, second).id == second
            for request in (first, second) if acknowledged else (first,):
                found = wait_for(lambda request=request: new.people().get(f"/v1/requests/{request}", RequestStatus))
                assert found.state == RequestState.QUEUED
            assert old.process.wait(120) == 0
            assert new.lease().epoch == 2
            assert new.stop() == 0


@pytest.mark.slow
def test_a_paused_daemon_that_wakes_after_a_takeover_writes_nothing(base):
    """What people and its worker have asked of it meanwhile is refused, and no file but its own log and database changes."""
    with DaemonProcess(base, **QUICK) as old:
        wait_for(old.up)
        worker, runs, waits, late = wait_for(old.worker), *(new_request_id() for _ in range(3))
        for name in (runs, waits):
            wait_for(lambda name=name: send(old.people(), name))
        lease = worker.lease()
        worker.started(lease)
        failed = Outcome(id=runs, attempt=1, error=Conflict("too late").report())
        asked = [
            _asked(old, lambda http: send(http, late)),
            _asked(old, lambda http: http.call("DELETE", f"/v1/requests/{waits}")),
            _asked(old, lambda http: http.call("DELETE", "/v1/pools/smol")),
            _asked(old, lambda http: http.put("/v1/pools/other", {"model": "org/model"}, PoolStatus)),
            Later(lambda: worker.outcome(failed)),
        ]
        _stop(old)
        time.sleep(SLEEP)
        with DaemonProcess(base, **QUICK) as new:
            heir = Worker(new, worker.replica)
            heir.report(ReplicaState.BUSY, running=(runs,))
            heir.finish(lease)
            for each in asked:
                each.start()
            _stop(new)
            before = _files(new)
            old.process.send_signal(signal.SIGCONT)
            assert old.process.wait(120) == 0
            assert {type(each.outcome()) for each in asked} == {Unreachable}
            assert _files(new) == before
            new.process.send_signal(signal.SIGCONT)
            found = wait_for(lambda: new.people().get("/v1/requests", list[RequestStatus]))  # it was stopped, too
            assert {one.id: one.state for one in found} == {runs: RequestState.COMPLETED, waits: RequestState.QUEUED}
            assert new.people().call("GET", f"/v1/requests/{runs}/result") == b"result"
            assert [pool.spec.name for pool in new.people().get("/v1/status", Status).pools] == ["smol"]


def _stop(daemon):
    """Let the process sleep; none of its threads does anything when this returns."""
    daemon.process.send_signal(signal.SIGSTOP)
    threads = Path(f"/proc/{daemon.process.pid}/task")
    wait_for(lambda: {_state(thread / "stat") for thread in threads.iterdir()} == {"T"})


def _state(stat):
    """See proc(5): a letter after the name, which may have anything in it."""
    return stat.read_text().rpartition(")")[2].split()[0]


class Later:
    """A call in a thread of its own, and what came of it."""

    def __init__(self, call):
        self._call, self._outcome = call, None
        self._thread = threading.Thread(target=self._run)
        self.start = self._thread.start

    def _run(self):
        try:
            self._outcome = self._call()
        except HpcError as error:
            self._outcome = error

    def outcome(self):
        self._thread.join(120)
        return self._outcome


def _asked(daemon, call):
    """A call to this very daemon, over a connection that it has taken, and never to its successor."""
    streams = [open_socket(Path(daemon.lease().socket))]

    def first() -> socket.socket:
        if not streams:
            raise Unreachable("it has hung up")
        return streams.pop()

    http = HttpClient(first, peer="the daemon")
    http.get("/v1/hello", Hello)
    return Later(lambda: call(http))


def _files(daemon):
    """All files of a home with their sizes and times, but for logs and databases of earlier epochs."""
    own = (f"daemon-{daemon.lease().epoch - 1}.sqlite", daemon.places.log.name)
    files = [path for path in daemon.places.home.rglob("*") if path.is_file() and not path.name.startswith(own)]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}
