"""Bringing one file of a dataset: checked as it comes, and gone on with where it stopped.

It grows in ``NAME.partial``, and gets its name when its size and its checksum are right and it is on the disk.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import quote

import google_crc32c

from nnsight_hpc.storage.checksums import crc32c_of
from nnsight_hpc.storage.shards import disk_errors
from nnsight_hpc.wire.errors import CorruptData
from nnsight_hpc.wire.files import sync_folder

if TYPE_CHECKING:
    from pathlib import Path

    from nnsight_hpc.client.tally import Tally
    from nnsight_hpc.wire.http import HttpClient
    from nnsight_hpc.wire.messages import DatasetFile

_TRIES = 2
"""What an earlier run has left may be damaged, so that all is brought once more; then it is damaged over there."""


def file_url(name: str, path: str) -> str:
    """Where the bytes of a dataset's file are asked for."""
    return f"/v1/datasets/{name}/files/{quote(path)}"


def is_there(target: Path, file: DatasetFile) -> bool:
    """Whether an earlier run has brought a file, and it is what it should be."""
    if not target.is_file() or target.stat().st_size != file.size:
        return False
    with target.open("rb") as existing:
        return crc32c_of(existing.fileno()) == file.crc32c


def bytes_there(target: Path) -> int:
    """How many bytes of a file, or of its unfinished copy, there are."""
    return next((one.stat().st_size for one in (target, partial_of(target)) if one.is_file()), 0)


def partial_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.partial")


def download(client: HttpClient, url: str, target: Path, file: DatasetFile, tally: Tally) -> None:
    """Bring a file, from where an earlier run stopped.

    Raises
    ------
    Unreachable
        The connection does not last (another run goes on).
    HpcError
        The disk is full.
    CorruptData
        Its bytes are not those that were announced.
    """
    partial = partial_of(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(_TRIES):
        checksum = _complete(client, url, partial, file, tally)
        if checksum == file.crc32c:
            partial.rename(target)
            sync_folder(target.parent)
            return
        partial.unlink()
        tally.found(-file.size)
    raise CorruptData(
        f"{file.path} arrived damaged",
        where=str(target),
        why=f"its crc32c is {checksum:08x}, expected {file.crc32c:08x}",
        next="the file on the cluster may be damaged: verify the dataset there",
    )


def _complete(client: HttpClient, url: str, partial: Path, file: DatasetFile, tally: Tally) -> int:
    """Bring what `partial` lacks; the checksum of all of it, computed while the bytes pass."""
    with partial.open("a+b", buffering=0) as output:
        if partial.stat().st_size > file.size:
            output.truncate(0)
        checksum, length = crc32c_of(output.fileno()), os.fstat(output.fileno()).st_size
        tally.found(length)

        def write(block: bytes) -> None:
            nonlocal checksum, length
            tally.came(len(block))
            with disk_errors(partial):
                _write_all(output, block)
            checksum, length = google_crc32c.extend(checksum, block), length + len(block)

        if length < file.size:
            client.download(url, write, start=length)
        with disk_errors(partial):
            os.fsync(output.fileno())
    if length != file.size:
        raise CorruptData(
            f"{file.path} has another size than was announced",
            where=str(partial),
            why=f"{length} bytes came, expected {file.size}",
            next="fetch again: the dataset may have been replaced meanwhile",
        )
    return checksum


def _write_all(output: BinaryIO, block: bytes) -> None:
    view = memoryview(block)
    while view:
        view = view[output.write(view) :]
