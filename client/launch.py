"""A daemon on this machine, started when somebody needs one."""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from nnsight_hpc.wire.errors import Conflict, Denied, HpcError, Incompatible, NotFound, Unreachable
from nnsight_hpc.wire.files import read_if_there
from nnsight_hpc.wire.http import HttpClient
from nnsight_hpc.wire.logs import readable
from nnsight_hpc.wire.messages import PROTOCOL, Hello, LeaseRecord, decode
from nnsight_hpc.wire.places import places, runtime_folder
from nnsight_hpc.wire.processes import is_alive

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nnsight_hpc.wire.places import Places

START_TIMEOUT = 60.0
"""Seconds until a daemon must answer: Python on a slow shared file system takes its time to import."""
STOP_TIMEOUT = 15.0
ANSWER_TIMEOUT = 10.0
_TAIL = 15


def ensure_daemon(executor: str, *, start: bool = True) -> Path:
    """The socket of this user's daemon, which is started when none answers.

    Parameters
    ----------
    executor
        ``embedded`` or ``slurm``.
    start
        False: raise `NotFound` instead of starting one.

    Raises `Unreachable` when it does not come up, with the log's last lines where there are any; `Denied` where somebody
    else owns its home.
    """
    where = places(executor)
    if found := running(where):
        return found[0]
    if not start:
        raise NotFound(
            f"no daemon runs here for {executor}",
            where=str(where.home),
            why=f"the last one ran on {host}" if (host := other_host(executor)) else "",
            next="nnsight-hpc daemon start",
        )
    _check_owner(where.home)
    try:
        with _alone(where.home):
            found = running(where) or _start(executor, where)
            return found[0]
    except OSError as error:
        raise Unreachable(
            "the daemon cannot be started",
            where=str(error.filename or where.home),
            why=error.strerror or str(error),
            next="look whether that file system is full, over your quota or read-only",
        ) from None


def other_host(executor: str) -> str | None:
    """The host of this user's daemon, where the lease says that it is not this one."""
    lease = _lease(places(executor))
    return None if lease is None or lease.host == socket.gethostname() else lease.host


def open_socket(path: Path, timeout: float = 10.0) -> socket.socket:
    """A connection to a Unix socket; raises OSError."""
    stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        stream.settimeout(timeout)
        stream.connect(str(path))
    except BaseException:
        stream.close()
        raise
    return stream


def running(where: Places) -> tuple[Path, Hello] | None:
    """Socket and hello of the daemon that holds the lease and answers; None when none does.

    Raises `Unreachable` when one takes the connection but does not answer: a second one would not help.
    """
    lease = _lease(where)
    if lease is None or lease.host != socket.gethostname():
        return None
    try:
        stream = open_socket(Path(lease.socket))
    except OSError:
        return None
    client = HttpClient(lambda: stream, peer=f"the daemon (process {lease.pid})")
    try:
        return Path(lease.socket), checked(client.get("/v1/hello", Hello, timeout=ANSWER_TIMEOUT))
    except Unreachable as error:
        if isinstance(error.__cause__, TimeoutError):
            raise
        return None  # it hung up: it is just stopping
    finally:
        client.close()


def log_tail(where: Places, *, lines: int = _TAIL, start: int = 0) -> str:
    """The last lines of the daemon's log, from byte `start` on."""
    data = read_if_there(where.log) or b""
    text = data[start if start <= len(data) else 0 :].decode("utf-8", "replace")  # a new file may have taken its place
    return readable("\n".join(text.splitlines()[-lines:]))


def wait_until_gone(pid: int, timeout: float) -> bool:
    """Wait for a process that is not our child; False when it is still there after `timeout` seconds."""
    until = time.monotonic() + timeout
    while is_alive(pid):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def _lease(where: Places) -> LeaseRecord | None:
    record = read_if_there(where.lease)
    return None if record is None else decode(record, LeaseRecord, what="lease")


def checked(hello: Hello) -> Hello:
    """The hello of a daemon on this host; raises `Incompatible` where it speaks another protocol."""
    if hello.protocol != PROTOCOL:
        raise Incompatible(
            f"the daemon here is version {hello.version} and speaks protocol {hello.protocol}, not {PROTOCOL}",
            next="stop it with the version that started it: nnsight-hpc daemon stop",
        )
    return hello


def _check_owner(home: Path) -> None:
    if home.exists() and home.stat().st_uid != os.getuid():
        raise Denied(
            f"{home} belongs to somebody else",
            why=f"its owner has uid {home.stat().st_uid}, you have {os.getuid()}",
            next="only its owner can start the daemon there; ask them to run `nnsight-hpc daemon start`",
        )


@contextmanager
def _alone(home: Path) -> Iterator[None]:
    """Only one program of this host starts a daemon for `home` at a time (across hosts the lease decides)."""
    name = hashlib.sha256(str(home).encode()).hexdigest()[:8]
    with (runtime_folder() / f"start-{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _start(executor: str, where: Places) -> tuple[Path, Hello]:
    where.home.mkdir(mode=0o700, parents=True, exist_ok=True)
    if found := _await_change(where):
        return found
    before = where.log.stat().st_size if where.log.exists() else 0
    pid = _spawn([sys.executable, "-P", "-m", "nnsight_hpc.daemon", "--executor", executor], where.log)
    until = time.monotonic() + START_TIMEOUT
    while time.monotonic() < until:
        ended = not is_alive(pid)  # looked at first: it may have handed over to another one and ended
        if found := running(where):
            return found
        if ended:
            raise _not_started("the daemon ended as soon as it was started", executor, where, before)
        time.sleep(0.05)
    what = f"the daemon (process {pid}) does not answer after {START_TIMEOUT:.0f} s"
    raise _not_started(what, executor, where, before)


def _await_change(where: Places) -> tuple[Path, Hello] | None:
    """Give a daemon that does not answer the time to end, or to make its socket anew: another would find its lease taken."""
    lease, until = _lease(where), time.monotonic() + STOP_TIMEOUT
    if lease is None or lease.host != socket.gethostname():
        return None
    while is_alive(lease.pid, born_before=lease.started + 1) and time.monotonic() < until:
        if found := running(where):
            return found
        time.sleep(0.05)
    return None


def _not_started(what: str, executor: str, where: Places, before: int) -> HpcError:
    lease = _lease(where)
    if lease is not None and lease.host != socket.gethostname():
        return Conflict(
            f"the daemon runs on another login node, {lease.host}",
            where=str(where.lease),
            why=log_tail(where, start=before),
            next=f"let `ssh {lease.host}` work from {socket.gethostname()} without a question, or log in to {lease.host}: set "
            f"host = user@{lease.host} for this cluster",
        )
    said = log_tail(where, start=before)
    by_hand = f"look for a full disk, or run it by hand: {sys.executable} -m nnsight_hpc.daemon --executor {executor}"
    return Unreachable(what, where=str(where.log), why=said or "its log is empty", next="" if said else by_hand)


# A child of a child, in a session of its own: no terminal's hang-up ends it, and it is not ours to wait for.
_DETACH = """
import os, sys
if pid := os.fork():
    print(pid)
else:
    os.setsid()
    os.dup2(2, 1)
    os.execv(sys.argv[1], sys.argv[1:])
"""


def _spawn(command: list[str], log: Path) -> int:
    """Start `command` detached, stdin empty, output into `log`; its process id."""
    opened = partial(os.open, mode=0o600)
    with open(log, "ab", opener=opened) as output:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _DETACH, *command],
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
            timeout=30,
            cwd=log.parent,
        )
    return int(done.stdout)
