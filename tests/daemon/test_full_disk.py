"""A state folder without room, that cannot be written, or with a damaged database: nothing acknowledged is lost."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from nnsight_hpc.wire.errors import HpcError, Unreachable
from nnsight_hpc.wire.messages import RequestStatus
from nnsight_hpc.wire.names import new_request_id
from nnsight_hpc.wire.pools import Status
from nnsight_hpc.wire.states import RequestState
from tests.daemon.process import DaemonProcess, send

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KIB = 1024


@pytest.fixture
def disk(base) -> Iterator[Path]:
    """The daemon's state, on a file system of its own with two megabytes."""
    folder = base / "state"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(file: Path, spare: int) -> None:
    """Write until there is no room, then leave so many bytes."""
    with file.open("wb", buffering=0) as written, suppress(OSError):
        while written.write(bytes(4 * KIB)):
            pass
    os.truncate(file, file.stat().st_size - spare)


def refused(daemon: DaemonProcess, request: str) -> str:
    """The words with which a request is not taken."""
    with pytest.raises(HpcError) as error:
        send(daemon.people(), request)
    return str(error.value)


def failed_start(daemon: DaemonProcess) -> str:
    """What a daemon says that cannot start."""
    before = len(daemon.log())
    assert daemon.spawn().wait(120) != 0
    said = daemon.log()[before:]
    assert "Traceback" not in said
    return said


def test_a_full_disk_refuses_in_words_and_loses_nothing(base, disk):
    """Whatever is left of it: what was taken stays, what comes is refused until there is room, also by the next daemon."""
    taken, late, filler = new_request_id(), new_request_id(), disk / "filler"
    with DaemonProcess(base) as daemon:
        daemon.up()
        worker = daemon.worker()
        send(daemon.people(), taken)
        for spare in (0, 4 * KIB, 12 * KIB):  # no room for the request, then none for its row
            fill(filler, spare)
            words = refused(daemon, late)
            assert re.search(r"No space left on device|database or disk is full|disk I/O error", words)
            assert re.search(r"free space|file system is full", words)
            assert daemon.people().get(f"/v1/requests/{taken}", RequestStatus).state == RequestState.QUEUED
            filler.unlink()
        daemon.places.log.write_text("\n")  # there is room for what is said then
        fill(filler, 0)
        daemon.kill()
        assert "No space left on device" in failed_start(daemon)
        filler.unlink()
        daemon.start()
        send(daemon.people(), late)
        worker.reconnect()
        for request in (taken, late):
            lease = worker.lease()
            assert lease.id == request
            worker.finish(lease)


def test_a_read_only_file_system_is_said_by_who_cannot_start(base, disk):
    """One clear message and the exit code of a daemon that is not there."""
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    environment = {**os.environ, "NNSIGHT_HPC_HOME": str(disk), "XDG_RUNTIME_DIR": str(base)}
    command = [sys.executable, "-m", "nnsight_hpc.client", "-c", "local", "daemon", "start"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == Unreachable.exit_code, done.stderr
    assert done.stderr.startswith("Error: the daemon cannot be started")
    assert "Read-only file system" in done.stderr


def test_a_damaged_database_is_kept_and_the_way_back_is_told(base):
    """The command that the message gives leads back to what the start before knew; a later epoch than all others serves."""
    first, second = new_request_id(), new_request_id()
    with DaemonProcess(base) as daemon:
        daemon.up()
        send(daemon.people(), first)
        daemon.stop()
        daemon.start()
        send(daemon.people(), second)
        daemon.stop()
        damaged = daemon.places.database(2)
        damaged.write_bytes(b"SQLite format 3\0" + bytes(range(256)) * 40)
        for _ in range(2):
            said = failed_start(daemon)
        assert f"where: {damaged}" in said
        assert list(daemon.places.home.glob("*.copy*")) == []
        command = re.search(r"mv .*?(?=;)", said)[0]
        subprocess.run(["sh", "-c", command], check=True)
        daemon.start()
        assert daemon.lease().epoch > 4
        assert [one.id for one in daemon.people().get("/v1/status", Status).requests] == [first]
        assert damaged.with_name(f"{damaged.name}.damaged").exists()


def test_without_an_earlier_database_the_way_is_an_empty_queue(base):
    """The first one is damaged: moved aside, as the message says, it lets the daemon start."""
    with DaemonProcess(base) as daemon:
        daemon.stop()
        daemon.places.database(1).write_bytes(b"no database")
        for _ in range(2):
            said = failed_start(daemon)
        assert "begin with an empty queue" in said
        subprocess.run(["sh", "-c", re.search(r"mv .*?(?=;)", said)[0]], check=True)
        assert daemon.start().people().get("/v1/status", Status).requests == ()
