from __future__ import annotations

import multiprocessing.shared_memory
import socket
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.cluster.leaks import Session, difference
from tests.cluster.process import identify

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

ORPHAN = ["sh", "-c", "setsid sleep 4321 >/dev/null & echo $!"]


@contextmanager
def orphan(**options: Any) -> Iterator[str]:
    """A process that no longer descends from the test."""
    done = subprocess.run(ORPHAN, check=True, stdout=subprocess.PIPE, text=True, **options)
    process = identify(int(done.stdout))
    assert process is not None
    try:
        yield str(process.pid)
    finally:
        process.end()


@contextmanager
def orphan_in_our_folder() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder, orphan(env={}, cwd=folder) as pid:
        yield pid


@contextmanager
def child() -> Iterator[str]:
    """A child without the session's mark."""
    process = subprocess.Popen(["sleep", "4321"], env={})
    try:
        yield str(process.pid)
    finally:
        process.kill()
        process.wait()


@contextmanager
def listener() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield str(server.getsockname()[1])


@contextmanager
def unix_socket() -> Iterator[str]:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("\0nnsight-hpc-leak")
        yield "nnsight-hpc-leak"


@contextmanager
def shared_memory() -> Iterator[str]:
    """A block that nobody has open any more; it is there until it is unlinked."""
    block = multiprocessing.shared_memory.SharedMemory(create=True, size=1)
    block.close()
    yield block.name.strip("/")
    block.unlink()


@contextmanager
def temporary_file() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="left-over-") as folder:
        yield Path(folder).name


@contextmanager
def mount(within: Path | None = None) -> Iterator[str]:
    with tempfile.TemporaryDirectory(dir=within) as folder:
        subprocess.run(["mount", "-t", "tmpfs", "none", folder], check=True)
        yield folder
        subprocess.run(["umount", folder], check=True)


THINGS = [
    ("process", orphan),
    ("process", orphan_in_our_folder),
    ("process", child),
    ("socket", listener),
    ("socket", unix_socket),
    ("shared memory", shared_memory),
    ("temporary file", temporary_file),
    pytest.param("mount", mount, marks=pytest.mark.cluster),
]


@pytest.mark.parametrize(("kind", "thing"), THINGS)
def test_what_is_ours_is_seen(
    test_session: Session, kind: str, thing: Callable[[], AbstractContextManager[str]]
) -> None:
    """Each kind of leftover is found as long as it is there, and not longer."""
    before = test_session.snapshot()
    with thing() as name:
        found = difference(before, test_session.snapshot())
        assert [line for line in found if line.startswith(kind) and name in line]
    assert test_session.leaks(before) == []


def test_a_strangers_process_is_not_seen(test_session: Session) -> None:
    """A process that neither descends from the session nor carries its mark is somebody else's."""
    before = test_session.snapshot()
    with orphan(env={}, cwd="/"):
        assert test_session.leaks(before) == []


def test_a_strangers_shared_memory_is_not_seen(test_session: Session) -> None:
    """Shared memory that a stranger's process has open is the stranger's."""
    before = test_session.snapshot()
    block = Path("/dev/shm/nnsight-hpc-test-stranger")
    with block.open("w") as file, orphan(env={}, cwd="/", pass_fds=[file.fileno()]):
        file.close()  # the stranger has it still
        assert test_session.leaks(before) == []
        block.unlink()


@pytest.mark.cluster
def test_a_strangers_mount_is_not_seen(test_session: Session) -> None:
    """What is mounted in a temporary folder that is not the session's is another's."""
    before = test_session.snapshot()
    with mount(within=test_session.temporary.parent):
        assert test_session.leaks(before) == []
