"""Starting the real daemon by need."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time

import psutil
import pytest

from nnsight_hpc.client import launch
from nnsight_hpc.client.launch import ensure_daemon, running, wait_until_gone
from nnsight_hpc.client.session import connect
from nnsight_hpc.wire.errors import Conflict, Denied, NotFound, Unreachable
from nnsight_hpc.wire.messages import Hello, LeaseRecord, encode
from nnsight_hpc.wire.places import places
from nnsight_hpc.wire.processes import is_alive


@pytest.fixture
def stopping(base):
    """Ends the embedded daemon of the test."""
    yield
    found = running(places("embedded"))
    if found is not None:
        os.kill(found[1].pid, signal.SIGTERM)
        assert wait_until_gone(found[1].pid, 120)


def test_a_daemon_is_started_by_need_and_found_again(base, stopping):
    """The first call starts it, detached and with its log; the second finds the same one."""
    client = connect("local")
    hello = client.get("/v1/hello", Hello)
    client.close()
    again = connect("local")
    assert again.get("/v1/hello", Hello) == hello
    again.close()
    assert os.getsid(hello.pid) != os.getsid(0)
    assert psutil.Process(hello.pid).ppid() != os.getpid()
    assert stat.S_IMODE(places("embedded").log.stat().st_mode) == 0o600


def test_many_at_once_start_one_daemon(base, stopping):
    """Eight processes that need it at the same moment end up with the same one."""
    code = (
        "from nnsight_hpc.client.launch import *; ensure_daemon('embedded'); print(running(places('embedded'))[1].pid)"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(8)]
    found = {process.communicate(timeout=120)[0].strip() for process in processes}
    assert len(found) == 1
    assert found.pop().isdigit()


def test_a_killed_daemon_is_followed_by_another(base, stopping):
    """A lease and a socket that nobody serves do not stand in the way."""
    ensure_daemon("embedded")
    first = running(places("embedded"))[1]
    killed = psutil.Process(first.pid)
    killed.kill()
    killed.wait(120)
    ensure_daemon("embedded")
    assert running(places("embedded"))[1].epoch > first.epoch


def test_one_that_is_stopping_is_waited_for(base, stopping):
    """Between its last answer and its end, a new one is not refused."""
    client = connect("local")
    pid = client.get("/v1/hello", Hello).pid
    client.call("POST", "/v1/stop?workers=0")
    client.close()
    while running(places("embedded")) is not None:
        time.sleep(0.001)
    ensure_daemon("embedded")
    assert running(places("embedded"))[1].pid != pid


def test_no_daemon_is_not_found_where_none_is_to_be_started(base):
    """Looking does not start anything."""
    with pytest.raises(NotFound, match="no daemon runs"):
        ensure_daemon("embedded", start=False)
    assert not places("embedded").home.exists()


def test_a_daemon_that_does_not_come_up_shows_its_log(base):
    """The last lines that it wrote are in the message."""
    places("embedded").home.mkdir(parents=True)
    (places("embedded").home / "datasets").write_text("a file, where it wants a folder")
    with pytest.raises(Unreachable) as caught:
        ensure_daemon("embedded")
    assert str(places("embedded").log) in caught.value.where
    assert caught.value.why == launch.log_tail(places("embedded"))
    assert caught.value.why


def test_a_daemon_on_another_login_node_is_named(base):
    """A fresh lease of another host: the message says which, and how to go there."""
    home = places("embedded").home
    home.mkdir(parents=True)
    lease = LeaseRecord(epoch=3, host="login2", pid=1, nonce="n", socket="/run/x.sock")
    (home / "lease.json").write_bytes(encode(lease))
    with pytest.raises(Conflict) as caught:
        ensure_daemon("embedded")
    assert "login2" in caught.value.what
    assert "user@login2" in caught.value.next


def test_one_that_takes_the_connection_but_does_not_answer_is_unreachable(base, monkeypatch):
    """A daemon that hangs is said to hang; no second one is started beside it."""
    monkeypatch.setattr(launch, "ANSWER_TIMEOUT", 0.2)
    home = places("embedded").home
    home.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(base / "run" / "silent.sock"))
        silent.listen()
        lease = LeaseRecord(
            epoch=1, host=socket.gethostname(), pid=os.getpid(), nonce="n", socket=str(base / "run" / "silent.sock")
        )
        (home / "lease.json").write_bytes(encode(lease))
        with pytest.raises(Unreachable):
            ensure_daemon("embedded")


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a folder away")
def test_a_home_of_somebody_else_is_denied(base):
    """Nobody starts a daemon in another's folder."""
    home = places("embedded").home
    home.mkdir(parents=True)
    os.chown(home, 12345, -1)
    with pytest.raises(Denied, match="belongs to somebody else"):
        ensure_daemon("embedded")


def test_a_process_that_nobody_waited_for_counts_as_gone():
    """A zombie serves no one."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
    assert not is_alive(process.pid)
    process.wait()


def test_a_daemon_whose_sockets_folder_was_removed_is_found_again(base, stopping):
    """At the last logout systemd removes $XDG_RUNTIME_DIR under a running daemon; it makes its socket anew."""
    ensure_daemon("embedded")
    hello = running(places("embedded"))[1]
    shutil.rmtree(base / "run" / "nnsight-hpc")
    ensure_daemon("embedded")
    assert running(places("embedded"))[1] == hello


def test_a_lease_from_before_a_reboot_delays_nobody(base, stopping, monkeypatch):
    """Its process number belongs to another process by now, whose end is not waited for."""
    monkeypatch.setattr(launch, "STOP_TIMEOUT", 250.0)
    home = places("embedded").home
    home.mkdir(parents=True)
    lease = LeaseRecord(
        epoch=4, host=socket.gethostname(), pid=os.getpid(), nonce="n", socket=str(base / "run" / "x.sock"), started=1.0
    )
    (home / "lease.json").write_bytes(encode(lease))
    began = time.monotonic()
    ensure_daemon("embedded")
    assert running(places("embedded"))[1].epoch == 5
    assert time.monotonic() - began < launch.STOP_TIMEOUT
