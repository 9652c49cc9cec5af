"""Connections that are lost and come back while somebody waits: the daemon's, and the SSH connection to it."""

from __future__ import annotations

import threading
import time
from contextlib import suppress

import psutil
import pytest

from nnsight_hpc.client import config, patience
from nnsight_hpc.client.patience import PatientClient
from nnsight_hpc.client.requests import find
from nnsight_hpc.client.session import connect
from nnsight_hpc.wire.errors import Conflict, Denied, Unreachable
from nnsight_hpc.wire.messages import Hello, RequestStatus
from nnsight_hpc.wire.states import RequestState
from tests.client.server import Server

ID = "r-abcdefgh2345"


@pytest.fixture
def restart(base):
    """Start the daemon of `local`, the one before having gone without a word."""
    running = []

    def stop() -> None:
        while running:
            running.pop().__exit__()

    def restart() -> Server:
        stop()
        running.append(Server(base / "state" / "embedded", base / "run" / "e.sock").__enter__())
        return running[-1]

    restart.stop = stop
    yield restart
    stop()


class Clock:
    """Goes on as long as somebody sleeps, and else stands still."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def hello(client: PatientClient) -> Hello:
    return client.get("/v1/hello", Hello)


def test_a_daemon_that_comes_back_is_found_again(restart):
    """What was asked while it was away is answered by the next one; a short absence is not spoken of."""
    restart()
    client = connect("local", start=False, patience=60)
    hello(client)
    restart.stop()
    threading.Timer(0.5, restart).start()
    assert hello(client).owner == "alice"


def test_a_long_absence_is_told_once_and_ends_with_the_last_error(restart, monkeypatch, capsys):
    """Whoever waits learns what it waits for; when its patience is over, why it was in vain."""
    clock = Clock()
    monkeypatch.setattr(patience, "time", clock)
    restart()
    client = connect("local", start=False, patience=9)
    hello(client)
    restart.stop()
    with pytest.raises(Unreachable, match="no daemon runs here"):
        hello(client)
    assert 9 <= clock.now - Clock.now < 19
    assert capsys.readouterr().err.count("goes on trying for 0:0") == 1


@pytest.mark.parametrize("error", [Denied("the key has changed"), Unreachable("no route"), Conflict("elsewhere")])
def test_what_was_never_reached_is_not_waited_for(error):
    """A wrong name or a refused login is told at once, and as it is."""

    def refuse() -> None:
        raise error

    with pytest.raises(type(error)) as raised:
        hello(PatientClient(refuse, peer="nobody", patience=60))
    assert raised.value is error


def test_a_refused_login_is_not_tried_again(restart):
    """Not even where the daemon was reached before: trying again would lock an account."""
    restart()
    streams = [connect("local")._open()]

    def once():
        if not streams:
            raise Denied("refused the login")
        return streams.pop()

    client = PatientClient(once, peer="the daemon", patience=60)
    hello(client)
    client.close()
    with pytest.raises(Denied):
        hello(client)


@pytest.mark.parametrize("transport", ["paramiko", "openssh"])
def test_who_waits_over_ssh_outlives_its_connection(transport, sshd, environment, slurm_server):
    """Cut three times on the login node, it is made again, and the wait goes on to the request's end."""
    config.add("uni", sshd.profile(transport, environment=environment))
    status = RequestStatus(id=ID, kind="run", pool="smol", state=RequestState.RUNNING, user="alice")
    slurm_server.requests[ID] = status
    slurm_server.hold.clear()
    ended = []
    request = find(ID, "uni")
    waiting = threading.Thread(target=lambda: ended.append(request.wait(120)))
    waiting.start()
    for _ in range(3):
        before = slurm_server.looks
        while slurm_server.looks == before:
            time.sleep(0.02)
        cut(sshd)
    slurm_server.hold.set()
    waiting.join()
    assert ended[0].state == RequestState.COMPLETED


def cut(sshd) -> None:
    """End the processes of sshd that serve connections."""
    serving = psutil.Process(sshd.pid).children()
    for process in serving:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(serving, timeout=120)
