"""What a test session leaves on the machine: a snapshot before, one after, and their difference.

Other people's processes come and go on the same machine, so only what is the session's own counts: processes that
descend from it, that carry its mark in environment, command line or working folder, or that share a network or process
namespace with such a one; the shared memory that no stranger uses; the temporary folder that the session has for
itself. Mounts are compared as they are, but for those that logins and containers make, and those in other sessions'
temporary folders.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

import psutil

from . import cleanup
from .layout import SESSION_VARIABLE
from .process import ProcessId, identify

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Snapshot = dict[str, set[str]]
"""Kind of thing to the things of that kind, in words."""

_SHARED_MEMORY = Path("/dev/shm")
_STRANGERS_MOUNTS = re.compile(
    r"/run/(user|credentials|docker|containerd|netns)(/|$)|/var/lib/(docker|containers|containerd)/"
)
_ENDS_WITH_ITS_PARENT = "multiprocessing.resource_tracker"  # by design: when the test process does


class Process(NamedTuple):
    identity: ProcessId
    parent: int
    command: str
    marked: bool
    namespaces: frozenset[str]


_OTHERS_CACHES = ("torchinductor_",)  # a folder that torch makes when it is imported, removed with the session's


@dataclass
class Session:
    """A test session with a mark that its processes inherit, and a temporary folder of its own.

    Use it as a context manager; in the block, `tempfile` and child processes use that folder.
    """

    identifier: str = field(default_factory=lambda: f"nnh-{secrets.token_hex(4)}")
    marks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.temporary = Path(tempfile.gettempdir()) / self.identifier
        self._saved = {name: os.environ.get(name) for name in (SESSION_VARIABLE, "TMPDIR")}

    def __enter__(self) -> Self:
        self.temporary.mkdir(mode=0o700)
        os.environ |= {SESSION_VARIABLE: self.identifier, "TMPDIR": str(self.temporary)}
        tempfile.tempdir = None  # read TMPDIR again
        return self

    def __exit__(self, *_: object) -> None:
        for name, value in self._saved.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
        tempfile.tempdir = None
        shutil.rmtree(self.temporary)

    def snapshot(self) -> Snapshot:
        ours = our_processes((self.identifier, *self.marks))
        own = _namespaces(os.getpid())
        return {
            "process": {f"{p.identity.pid} (started at {p.identity.start}): {p.command}" for p in ours},
            "namespace": {name for p in ours for name in p.namespaces - own},
            "socket": set(_own_sockets()),
            "mount": {path for path in _mounts() if not self._in_a_strangers_folder(path)},
            "shared memory": set(_shared_memory({p.identity.pid for p in ours})),
            "temporary file": {
                str(path) for path in self.temporary.iterdir() if not path.name.startswith(_OTHERS_CACHES)
            },
            "cluster": {record.identifier for record in cleanup.records() if record.session == self.identifier},
        }

    def _in_a_strangers_folder(self, path: str) -> bool:
        """Whether `path` lies in the folder for temporary files, but not below what is this session's own there."""
        ours = any(mark in path for mark in (self.identifier, *self.marks))
        return path.startswith(f"{self.temporary.parent}/") and not ours

    def leaks(self, before: Snapshot, timeout: float = 60.0) -> list[str]:
        """What is there that was not `before`; what is about to end gets `timeout` seconds for it."""
        end = time.monotonic() + timeout
        while (left := difference(before, self.snapshot())) and time.monotonic() < end:
            time.sleep(0.2)
        return left


def difference(before: Snapshot, after: Snapshot) -> list[str]:
    return [f"{kind} {item}" for kind, items in after.items() for item in sorted(items - before[kind])]


def our_processes(marks: Iterable[str]) -> list[Process]:
    """Processes that descend from this one, carry one of `marks`, or share a namespace of their own with such a one."""
    wanted = [mark.encode() for mark in marks]
    every = {p.identity.pid: p for p in _processes(wanted) if _ENDS_WITH_ITS_PARENT not in p.command}
    own = _namespaces(os.getpid())
    ours = [p for p in every.values() if p.marked or _descends(p, every)]
    shared = {name for p in ours for name in p.namespaces - own}
    known = {p.identity.pid for p in ours} | {os.getpid()}
    return ours + [p for pid, p in every.items() if pid not in known and p.namespaces & shared]


def _processes(marks: list[bytes]) -> Iterator[Process]:
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is not ours to look at
            identity = identify(int(folder.name))
            command = (folder / "cmdline").read_bytes()
            if identity is not None and command and identity.pid != os.getpid():  # kernel threads have no command line
                text = b"\n".join(
                    [command, (folder / "environ").read_bytes(), os.fsencode((folder / "cwd").readlink())]
                )
                yield Process(
                    identity,
                    int((folder / "stat").read_text().rpartition(")")[2].split()[1]),
                    command.replace(b"\0", b" ").decode(errors="replace").strip(),
                    any(mark in text for mark in marks),
                    _namespaces(identity.pid),
                )


def _descends(process: Process, every: dict[int, Process]) -> bool:
    """Whether this very process is above `process`."""
    while process.parent != os.getpid():
        if process.parent not in every:
            return False
        process = every[process.parent]
    return True


def _namespaces(pid: int) -> frozenset[str]:
    return frozenset(str(Path(f"/proc/{pid}/ns/{kind}").readlink()) for kind in ("net", "pid"))


def _own_sockets() -> Iterator[str]:
    """Sockets that this process listens on or has bound to a name."""
    for connection in psutil.Process().net_connections(kind="all"):
        if connection.laddr and connection.status in {psutil.CONN_LISTEN, psutil.CONN_NONE}:
            yield f"{connection.laddr}"


def _mounts() -> Iterator[str]:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        path = line.split()[4]
        if not _STRANGERS_MOUNTS.match(path):
            yield path


def _shared_memory(ours: set[int]) -> Iterator[str]:
    """Files in shared memory, without those that a process which is not ours has open or mapped."""
    for path in map(str, _SHARED_MEMORY.iterdir()):
        strangers = (int(p.name) for p in Path("/proc").glob("[0-9]*") if int(p.name) not in {*ours, os.getpid()})
        if not any(_holds(pid, path) for pid in strangers) and os.path.lexists(path):  # one may just have removed it
            yield path


def _holds(pid: int, path: str) -> bool:
    """Whether a process has a file open or mapped; asked in this order, since a file is closed after it was mapped."""
    with suppress(OSError):
        if any(_target(file) == path for file in Path(f"/proc/{pid}/fd").iterdir()):
            return True
    with suppress(OSError):
        return path in Path(f"/proc/{pid}/maps").read_text()
    return False


def _target(link: Path) -> str:
    with suppress(OSError):  # it has been closed
        return os.readlink(link)  # noqa: PTH115 - may be no path
    return ""
