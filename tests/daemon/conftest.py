"""Fixtures: a short folder of one's own, and daemons in it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.daemon.process import DaemonProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.daemon.process import Worker


@pytest.fixture
def base() -> Iterator[Path]:
    """A folder with a short path: Linux refuses long ones for sockets."""
    folder = Path(tempfile.mkdtemp(prefix="d-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def daemon_with(base: Path) -> Iterator[Callable[..., DaemonProcess]]:
    """Start a daemon with other settings than usual."""
    started: list[DaemonProcess] = []

    def start(**settings: Any) -> DaemonProcess:
        started.append(DaemonProcess(base, **settings))
        return started[-1].start()

    yield start
    for daemon in started:
        daemon.__exit__()


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    """One daemon for all tests of a module that leave it running."""
    folder = Path(tempfile.mkdtemp(prefix="d-"))
    with DaemonProcess(folder) as daemon:
        yield daemon
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def worker(daemon: DaemonProcess) -> Worker:
    """A ready worker of the pool `smol` of that daemon."""
    daemon.up()
    return daemon.worker()


@pytest.fixture
def request_id() -> str:
    from nnsight_hpc.wire.names import new_request_id

    return new_request_id()
