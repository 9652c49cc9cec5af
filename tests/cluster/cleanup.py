"""Remove clusters: this process's own, and those that a process left behind which no longer exists.

A cluster is recorded in ``BASE/ID.json`` before anything of it exists, and the record goes last.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import msgspec

from nnsight_hpc.wire.files import read_if_there, write_atomically

from .layout import BASE, make_folder
from .process import ProcessId


class Record(msgspec.Struct):
    """What is on the machine of one cluster.

    Attributes
    ----------
    owner
        The process that the cluster ends with; None: it stays until it is removed by hand.
    session
        The test session that it belongs to, or nothing.
    hosts
        Process 1 of each host.
    boot
        The machine's boot that all these processes belong to.
    """

    identifier: str
    owner: ProcessId | None
    session: str
    hosts: dict[str, ProcessId] = msgspec.field(default_factory=dict)
    boot: str = msgspec.field(default_factory=lambda: Path("/proc/sys/kernel/random/boot_id").read_text().strip())

    @property
    def folder(self) -> Path:
        return BASE / self.identifier

    @property
    def file(self) -> Path:
        return BASE / f"{self.identifier}.json"

    def save(self) -> None:
        make_folder(BASE)
        write_atomically(self.file, msgspec.json.encode(self))

    def abandoned(self) -> bool:
        return not self.of_this_boot() or (self.owner is not None and not self.owner.alive())

    def of_this_boot(self) -> bool:
        return self.boot == Record("", None, "").boot


def records() -> list[Record]:
    """All clusters on this machine."""
    contents = (read_if_there(path) for path in sorted(BASE.glob("*.json")))
    return [msgspec.json.decode(content, type=Record) for content in contents if content is not None]


def find(identifier: str) -> Record | None:
    return next((record for record in records() if record.identifier == identifier), None)


def sweep() -> list[str]:
    """Remove every cluster whose owner is gone; their identifiers."""
    abandoned = [record for record in records() if record.abandoned()]
    for record in abandoned:
        remove(record)
    return [record.identifier for record in abandoned]


def remove(record: Record) -> None:
    """End the hosts of a cluster, and with each all its processes and mounts; then remove its files.

    Safe to call again, also while another process does the same.
    """
    if record.of_this_boot():
        for init in record.hosts.values():
            init.end()
    shutil.rmtree(record.folder, ignore_errors=True)
    if record.folder.exists():
        shutil.rmtree(record.folder)  # says why
    record.file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # other clusters
        BASE.rmdir()
