"""`connect` and `disconnect`: one login for many commands, as real processes against a real sshd."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys

import pytest

from nnsight_hpc.client import config
from nnsight_hpc.client.launch import wait_until_gone
from nnsight_hpc.client.session import connect
from nnsight_hpc.client.share_socket import share_socket, sharing_process
from nnsight_hpc.wire.messages import Hello

PROGRAM = [sys.executable, "-m", "nnsight_hpc.client", "-c", "uni"]


@pytest.fixture(params=["paramiko", "openssh"])
def profile(request, sshd, environment):
    profile = sshd.profile(request.param, environment=environment)
    config.add("uni", profile)
    yield profile
    if (process := sharing_process(share_socket(profile))) is not None:
        os.kill(process, signal.SIGTERM)
        wait_until_gone(process, 120)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*PROGRAM, *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)


def logins(sshd) -> int:
    return (sshd.folder / "log").read_text().count("Accepted publickey")


def test_later_commands_use_the_one_login(profile, sshd, slurm_server):
    """Three calls, one login; afterwards socket and process are gone, and a call logs in by itself."""
    before = logins(sshd)
    assert run("connect", "--background").returncode == 0
    path = share_socket(profile)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for _ in range(3):
        client = connect("uni")
        assert client.get("/v1/hello", Hello) == slurm_server.hello()
        client.close()
    assert logins(sshd) - before == 1
    process = sharing_process(path)
    assert run("disconnect").returncode == 0
    assert wait_until_gone(process, 120)
    assert sorted(entry.name for entry in path.parent.iterdir() if not entry.name.startswith("start-")) == []
    client = connect("uni")
    client.get("/v1/hello", Hello)
    client.close()
    assert logins(sshd) - before == 2


def test_in_the_foreground_ctrl_c_ends_it(profile, sshd, slurm_server):
    """It says that it is connected, and Ctrl-C leaves nothing behind."""
    process = subprocess.Popen([*PROGRAM, "connect"], stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)
    assert process.stderr.readline().startswith("Connected to uni")
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=120)
    assert (process.returncode, rest.strip()) == (130, "")
    assert not share_socket(profile).exists()


def test_a_second_connect_is_a_conflict(profile, sshd, slurm_server):
    """One is enough."""
    assert run("connect", "--background").returncode == 0
    second = run("connect", "--background")
    assert second.returncode == 5
    assert "is open already" in second.stderr


def test_a_failed_login_is_said_and_nothing_stays(sshd, environment, base, slurm_server):
    """The background process says why on the terminal, and its exit code is handed on."""
    config.add("uni", sshd.profile("paramiko", environment=environment, identity_file=str(sshd.folder / "otherkey")))
    done = run("connect", "--background")
    assert done.returncode == 6
    assert "refused the login" in done.stderr


def test_disconnect_without_a_connection_is_not_found(profile):
    """Nothing to end."""
    done = run("disconnect")
    assert done.returncode == 4
    assert "no connection to uni is open" in done.stderr


def test_a_dead_connection_falls_back_to_a_login_of_ones_own(profile, sshd, slurm_server):
    """A socket whose process was killed stands in nobody's way."""
    assert run("connect", "--background").returncode == 0
    process = sharing_process(share_socket(profile))
    os.kill(process, signal.SIGKILL)
    assert wait_until_gone(process, 120)
    client = connect("uni")
    assert client.get("/v1/hello", Hello) == slurm_server.hello()
    client.close()
    if profile.transport == "openssh":  # the master outlives a killed process; the next connect and disconnect end it
        assert run("connect", "--background").returncode == 0
        assert run("disconnect").returncode == 0


def test_who_only_looks_starts_no_daemon(profile, environment):
    """Over the shared connection, too: after `daemon stop` there is none, and `status` says so."""
    assert run("connect", "--background").returncode == 0
    assert run("daemon", "stop").returncode == 0
    assert run("status").returncode == 4
