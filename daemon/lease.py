"""The lease: which daemon serves a home, on whatever host of the cluster, and the order in which they came (the epoch).

``lease.json`` says who. Its owner touches it; when it was not touched for `Config.lease_stale` by the file server's
clock, or its process on this very host is dead, the next daemon takes over with a larger epoch. Of several who try,
the one wins that makes ``lease-EPOCH.claim``: ``link`` either makes a name or fails, on NFS too. The winner writes
``lease.json`` before the database of its epoch exists, and others list the databases before they read the lease: so
nobody mistakes the winner's database for one that was left behind.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import socket
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import msgspec

from nnsight_hpc.wire.errors import Conflict, InvalidInput, Unreachable
from nnsight_hpc.wire.files import read_if_there, write_atomically
from nnsight_hpc.wire.messages import LeaseRecord, decode, encode
from nnsight_hpc.wire.processes import is_alive

if TYPE_CHECKING:
    from pathlib import Path

    from nnsight_hpc.daemon.config import Config

logger = logging.getLogger(__name__)

_DATABASE = re.compile(r"daemon-(\d+)\.sqlite")
_CLAIM = re.compile(r"lease-(\d+)\.claim")


class Lease:
    """A lease that this process holds, until `touch` finds that it does not."""

    def __init__(self, config: Config, record: LeaseRecord, held_since: float) -> None:
        self.record = record
        self._path = config.places.lease
        self._trusted_for = config.lease_stale - config.lease_touch
        self._touched = held_since

    def touch(self) -> bool:
        """Renew it; False when another daemon has it, or when it was removed."""
        now = _boot_time()
        current = _read(self._path)
        if current is None or current.epoch > self.record.epoch:
            return False
        if current.nonce != self.record.nonce:  # an older daemon that slept between its claim and its lease
            write_atomically(self._path, encode(self.record))
        os.utime(self._path)
        self._touched = now
        return True

    def say_socket(self, path: Path) -> None:
        """Tell where the socket for people is by now."""
        if self.touch():
            self.record = msgspec.structs.replace(self.record, socket=str(path))
            write_atomically(self._path, encode(self.record))

    def check(self) -> None:
        """Raise `Unreachable` unless the lease was renewed so lately that nobody can have taken it over since."""
        if _boot_time() - self._touched > self._trusted_for:
            raise Unreachable(
                "this daemon is not sure that it still has its lease, and takes nothing on",
                where=f"{self.record.host}, process {self.record.pid}",
                why="it was stopped for a while, or its file system did not answer",
                next="try again in a minute",
            )

    def release(self) -> None:
        current = _read(self._path)
        if current is not None and current.nonce == self.record.nonce:
            self._path.unlink(missing_ok=True)


def claim(config: Config, *, socket_path: Path, address: str, port: int, version: str) -> LeaseRecord:
    """Win the next epoch of this home, without serving it yet; raises `Conflict` that says who else has or wins it."""
    known = _epochs(config.places.home, _DATABASE)
    current = _read(config.places.lease)
    if current is not None and not _is_stale(config.places.lease, current, config.lease_stale):
        raise _taken(current)
    return _claim(
        config,
        LeaseRecord(
            epoch=1 + max([*known, 0 if current is None else current.epoch]),
            host=socket.gethostname(),
            pid=os.getpid(),
            nonce=secrets.token_hex(16),
            socket=str(socket_path),
            address=address,
            port=port,
            version=version,
            started=time.time(),
        ),
    )


def publish(config: Config, record: LeaseRecord) -> Lease:
    """Say in ``lease.json`` that the epoch which was claimed has begun; raises `Conflict` when a later one has."""
    now = _boot_time()
    write_atomically(config.places.lease, encode(record))
    if any(epoch > record.epoch for epoch in _epochs(config.places.home, _CLAIM)):
        raise Conflict("another daemon took over while this one was starting")
    _remove_old_claims(config.places.home, record.epoch)
    return Lease(config, record, now)


def _claim(config: Config, record: LeaseRecord) -> LeaseRecord:
    """The record with an epoch that nobody has claimed, nor a later one: those of claimers that died are passed over.

    Raises `Conflict` when another daemon is just claiming it.
    """
    while True:
        if newest := [epoch for epoch in _epochs(config.places.home, _CLAIM) if epoch >= record.epoch]:
            claim = config.places.home / f"lease-{max(newest)}.claim"
            other = _read(claim)
            if other is not None and not _is_stale(claim, other, config.lease_stale):
                raise _taken(other)
            record = msgspec.structs.replace(record, epoch=max(newest) + 1)
        if _link_new(config.places.home / f"lease-{record.epoch}.claim", encode(record)):
            return record


def _link_new(path: Path, data: bytes) -> bool:
    """Make `path` with its content at once; False when the name exists."""
    draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    write_atomically(draft, data)
    try:
        path.hardlink_to(draft)
    except FileExistsError:
        return False
    else:
        return True
    finally:
        draft.unlink()


def _taken(record: LeaseRecord) -> Conflict:
    return Conflict(
        f"a daemon already runs on {record.host}",
        where=f"process {record.pid}, epoch {record.epoch}",
        next="`nnsight-hpc daemon stop` on that host ends it",
    )


def _is_stale(path: Path, record: LeaseRecord, stale: float) -> bool:
    if record.host == socket.gethostname() and not is_alive(record.pid, born_before=record.started + 1):
        return True
    try:
        touched = path.stat().st_mtime
    except FileNotFoundError:
        return True
    return server_time(path.parent) - touched > stale


def server_time(folder: Path) -> float:
    """Now, by the clock that stamps the files in `folder`."""
    probe = folder / f"clock-{secrets.token_hex(4)}"
    probe.touch(mode=0o600)
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink()


def _boot_time() -> float:
    """Seconds that go on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _read(path: Path) -> LeaseRecord | None:
    data = read_if_there(path)
    try:
        return None if data is None else decode(data, LeaseRecord, what=str(path))
    except InvalidInput as error:  # written by hand, or by a program that is not ours
        logger.warning("%s", error)
        return None


def _epochs(home: Path, pattern: re.Pattern[str]) -> list[int]:
    return [int(found[1]) for path in home.iterdir() if (found := pattern.fullmatch(path.name))]


def _remove_old_claims(home: Path, epoch: int) -> None:
    for old in _epochs(home, _CLAIM):
        if old < epoch:
            with suppress(FileNotFoundError):
                (home / f"lease-{old}.claim").unlink()
