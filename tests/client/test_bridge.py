"""The bridge as a process of its own: bytes, ends, and errors."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import threading
import time

import msgspec
import psutil
import pytest

from nnsight_hpc.wire.errors import ErrorReport
from nnsight_hpc.wire.messages import PROTOCOL, Hello, LeaseRecord, decode, encode
from tests.rest import shares_at_rest

SIZE = 64 << 20


class Echo:
    """A daemon that says hello over HTTP, and echoes what else it gets."""

    def __init__(self, base) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        path = base / "run" / "echo.sock"
        self.listener.bind(str(path))
        self.listener.listen()
        home = base / "state" / "slurm"
        home.mkdir(parents=True)
        lease = LeaseRecord(epoch=1, host=socket.gethostname(), pid=os.getpid(), nonce="n", socket=str(path))
        (home / "lease.json").write_bytes(encode(lease))
        self.hello = Hello(protocol=PROTOCOL, version="1", owner="alice", host="h", pid=1, epoch=1, executor="slurm")
        self.hang_up_after: int | None = None
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            data = connection.recv(1 << 18)
            if data.startswith(b"GET /v1/hello"):
                body = encode(self.hello)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
                data = connection.recv(1)
            while data:
                connection.sendall(data)
                if self.hang_up_after is not None:
                    return
                data = connection.recv(1 << 18)


@pytest.fixture
def echo(base):
    echo = Echo(base)
    yield echo
    echo.listener.close()


@pytest.fixture
def bridge(base):
    processes = []

    def start(*arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "nnsight_hpc.client", "bridge", *arguments]
        processes.append(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            stream.close()


def test_64_mib_cross_both_ways_unchanged_and_the_end_is_passed_on(echo, bridge):
    """What goes in comes out, at the same time both ways; stdin's end reaches the daemon, and its end ends the bridge."""
    process = bridge()
    assert decode(process.stdout.readline(), Hello) == echo.hello
    sent = random.Random(1).randbytes(SIZE)

    def send() -> None:
        process.stdin.write(sent)
        process.stdin.close()

    threading.Thread(target=send, daemon=True).start()
    assert process.stdout.read() == sent
    assert process.wait(120) == 0


def test_the_daemon_hanging_up_ends_the_bridge(echo, bridge):
    """A daemon that goes takes the bridge with it, although stdin is still open."""
    echo.hang_up_after = 1
    process = bridge()
    process.stdout.readline()
    process.stdin.write(b"x")
    process.stdin.flush()
    assert process.wait(120) == 0


def test_the_reader_going_ends_the_bridge_although_nobody_talks(echo, bridge):
    """When sshd drops its ends, the bridge is gone, also in the middle of silence."""
    process = bridge()
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(120) == 0


def test_an_idle_bridge_uses_no_cpu(echo, bridge):
    """Nobody talks, nothing runs."""
    process = bridge()
    process.stdout.readline()
    time.sleep(0.3)
    assert shares_at_rest([psutil.Process(process.pid)], 0.01, 2)[0] <= 0.01


def test_without_a_daemon_the_error_is_the_first_line(base, bridge):
    """The other side reads it in place of the hello, and the exit code is the error's."""
    process = bridge("--no-start")
    output, _ = process.communicate(timeout=120)
    report = msgspec.json.decode(output, type=ErrorReport)
    assert (report.kind, process.returncode) == ("NotFound", 4)
    assert "no daemon runs" in report.what
