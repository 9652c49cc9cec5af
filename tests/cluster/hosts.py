"""A host: namespaces of its own for network, processes, mounts, host name and shared memory, held by its process 1.

Nothing of it exists outside these namespaces: killing process 1 is a power failure, after which the kernel has ended
every process of the host and removed its mounts and network devices.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from nnsight_hpc.wire.errors import Unreachable

from .process import ProcessId, identify

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from .furnishing import Furnishing

_INIT = Path(__file__).with_name("host_init.py")
_UNSHARE = ["unshare", "--fork", "--kill-child", "--pid", "--net", "--uts", "--ipc", "--mount", "--propagation=private"]
_CLONE_NEWPID = 0x20000000  # sched.h
_libc = ctypes.CDLL(None, use_errno=True)
_entering = threading.Lock()


@dataclass
class Host:
    """A host that is up, or was: `init` is its process 1.

    `keeper` is the process that started it; None where this object found a host that another process had started.
    """

    name: str
    init: ProcessId
    keeper: subprocess.Popen[str] | None = None
    _children: list[subprocess.Popen[Any]] = field(default_factory=list)

    def popen(
        self, argv: Sequence[str | Path], *, user: str, env: Mapping[str, str], cwd: str | Path, **options: Any
    ) -> subprocess.Popen[Any]:
        """Start `argv` on the host as `user`, with the user's groups and exactly `env`; options as `subprocess.Popen`.

        Its process number is that of the program itself, so signals reach it, and nothing stands between.

        Raises
        ------
        Unreachable
            The host is down.
        """
        if not self.init.alive():
            raise Unreachable(f"the host {self.name} of the test cluster is down")
        enter = ["nsenter", f"--target={self.init.pid}", "--mount", "--net", "--uts", "--ipc"]
        become = ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups"]
        command = [*enter, *become, "env", f"--chdir={cwd}", *map(str, argv)]
        with _children_born_in(self.init.pid):
            process = subprocess.Popen(command, env=dict(env), umask=0o022, **options)
        self._children = [child for child in self._children if child.poll() is None] + [process]
        return process

    def path(self, path: str) -> Path:
        """Where the machine sees the host's `path`."""
        return Path(f"/proc/{self.init.pid}/root{path}")

    def listens(self, port: int) -> bool:
        """Whether a program on the host accepts TCP connections to `port` (proc_pid_net(5): address, state 0A)."""
        tables = [Path(f"/proc/{self.init.pid}/net/{table}").read_text() for table in ("tcp", "tcp6")]
        rows = [line.split() for table in tables for line in table.splitlines()[1:]]
        return any(row[1].endswith(f":{port:04X}") and row[3] == "0A" for row in rows)

    def listens_on(self, path: str) -> bool:
        """Whether a program on the host accepts connections to the Unix socket `path` (flag __SO_ACCEPTCON)."""
        rows = [line.split() for line in Path(f"/proc/{self.init.pid}/net/unix").read_text().splitlines()[1:]]
        return any(row[-1] == path and row[3] == "00010000" for row in rows)

    def runs(self, pid: int) -> bool:
        """Whether the host has a process of this number, as programs on it see it."""
        return self.path(f"/proc/{pid}").exists()

    def network_commands(self, text: str) -> None:
        """Run ``ip -batch`` in the host's network; process numbers in `text` are the machine's."""
        _checked(["nsenter", f"--target={self.init.pid}", "--net", "ip", "-batch", "-"], text)

    def detach(self) -> None:
        """Let the host live on after this process."""
        _pipe(self.keeper).write("stay\n")
        _pipe(self.keeper).flush()

    def power_off(self) -> None:
        """End all its processes at once, as a power failure does."""
        for child in self._children:
            child.kill()
        for child in self._children:
            child.wait()  # process 1 cannot go while a process of its namespace is not reaped
        self.init.end()
        if self.keeper is not None:
            self.keeper.communicate(timeout=120)


def boot(furnishing: Furnishing, log: IO[str], environment: Mapping[str, str]) -> Host:
    """Start a host.

    Raises
    ------
    Unreachable
        Its process 1 ended; the reason stands in `log`.
    """
    keeper = subprocess.Popen(
        [*_UNSHARE, sys.executable, "-I", "-S", str(_INIT)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        start_new_session=True,  # Ctrl-C in the terminal is for the tests
        env={**os.environ, **environment},
    )
    _pipe(keeper).write(json.dumps(furnishing.as_dict()) + "\n")
    _pipe(keeper).flush()
    assert keeper.stdout is not None
    answer = keeper.stdout.readline()
    init = identify(int(answer)) if answer else None
    if init is None:
        keeper.communicate()
        raise Unreachable(
            f"the host {furnishing.hostname} did not start", where=log.name, why=Path(log.name).read_text()
        )
    return Host(furnishing.hostname, init, keeper)


@contextmanager
def _children_born_in(init: int) -> Iterator[None]:
    """Processes that this thread starts in the block belong to the PID namespace of `init` (setns(2), CLONE_NEWPID).

    ``nsenter --pid`` would do it with a process more, which would keep signals from the program.
    """
    there, here = Path(f"/proc/{init}/ns/pid"), Path("/proc/self/ns/pid")
    with _entering, there.open("rb") as theirs, here.open("rb") as ours:
        _set_namespace(theirs)
        try:
            yield
        finally:
            _set_namespace(ours)


def _set_namespace(file: IO[bytes]) -> None:
    if _libc.setns(file.fileno(), _CLONE_NEWPID) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), file.name)


def _pipe(keeper: subprocess.Popen[str] | None) -> IO[str]:
    assert keeper is not None
    assert keeper.stdin is not None
    return keeper.stdin


def _checked(command: list[str], text: str) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120, input=text)
    if done.returncode != 0:
        raise Unreachable("a network of the test cluster could not be set up", where=" ".join(command), why=done.stderr)
