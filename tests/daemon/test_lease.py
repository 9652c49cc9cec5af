"""One daemon a home: who wins, who yields, and what a daemon does that has lost its lease."""

from __future__ import annotations

import os
import signal
import socket
import time

import pytest

from nnsight_hpc.wire.errors import HpcError
from nnsight_hpc.wire.files import write_atomically
from nnsight_hpc.wire.messages import Hello, LeaseRecord, RequestStatus, encode
from nnsight_hpc.wire.names import new_request_id
from nnsight_hpc.wire.states import RequestState
from tests.daemon.process import DaemonProcess, send, wait_for


def test_of_several_daemons_that_race_one_wins(base):
    """Three start at once: one serves, the others end with the exit code of a conflict and say who has it."""
    daemon = DaemonProcess(base)
    processes = [daemon.spawn() for _ in range(3)]
    wait_for(lambda: sum(p.poll() is None for p in processes) == 1)
    time.sleep(0.5)
    (daemon.process,) = (p for p in processes if p.poll() is None)
    assert sorted(p.returncode for p in processes if p.returncode is not None) == [5, 5]
    assert daemon.people().get("/v1/hello", Hello).pid == daemon.process.pid
    assert daemon.log().count("a daemon already runs on") == 2
    assert daemon.stop() == 0


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
        assert process.wait(20) == 5
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


def test_a_daemon_that_slept_takes_nothing_on_and_ends(base):
    """Stopped for longer than its lease lasts, it acknowledges no request, and ends when it finds its successor."""
    old, new = (DaemonProcess(base, lease_touch=0.4, lease_stale=2.0) for _ in range(2))
    old.start().up()
    http, request = old.people(), new_request_id()
    http.get("/v1/hello", Hello)  # the connection that it keeps
    old.process.send_signal(signal.SIGSTOP)
    time.sleep(2.2)
    new.process = new.spawn()
    wait_for(lambda: new.people().get("/v1/hello", Hello, timeout=0.3).epoch == 2)
    send(new.people(), request)
    old.process.send_signal(signal.SIGCONT)
    with pytest.raises(HpcError):
        send(http, new_request_id())
    assert old.process.wait(10) == 0
    assert new.lease().epoch == 2
    assert new.people().get(f"/v1/requests/{request}", RequestStatus).state == RequestState.QUEUED
    assert new.stop() == 0
    new.__exit__()
