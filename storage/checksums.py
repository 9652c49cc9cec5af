"""Checksums of files, and the list of files that makes up a dataset, for transfer.

crc32c runs at several GB/s (SHA-256 at 0.2): it finds damage, and does not protect against intent.
"""

from __future__ import annotations

import os
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import google_crc32c
import msgspec

from nnsight_hpc.storage.hdf5 import INDEX
from nnsight_hpc.storage.layout import array_paths
from nnsight_hpc.storage.manifest import MANIFEST, read_manifest
from nnsight_hpc.storage.schema import METADATA, DatasetAttributes, read_attributes
from nnsight_hpc.wire.errors import Conflict, CorruptData, InvalidInput

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_BLOCK_BYTES = 1 << 20


class FileSum(msgspec.Struct, frozen=True):
    """A file of a dataset: its path below the root (with ``/``), size in bytes, and crc32c as 8 hexadecimal digits."""

    path: str
    bytes: int
    crc32c: str


def crc32c_of(file: int, *, checksum: int = 0, offset: int = 0) -> int:
    """The crc32c of all bytes of an open file, read in blocks by position; `checksum` is that of the first `offset`."""
    while block := os.pread(file, _BLOCK_BYTES, offset):
        checksum = google_crc32c.extend(checksum, block)
        offset += len(block)
    return checksum


def file_sum(root: Path, path: str) -> FileSum:
    """Size and checksum of the file at `path` below `root`, as they are now."""
    descriptor = os.open(root / path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return FileSum(path, os.fstat(descriptor).st_size, f"{crc32c_of(descriptor):08x}")
    finally:
        os.close(descriptor)


def list_files(root: Path) -> list[FileSum]:
    """Every file of the complete dataset `root`, in a fixed order: what a copy needs, and what it is checked against.

    Shards are listed as the manifest has them, without reading them; the small metadata files are read.

    Raises
    ------
    Conflict
        The dataset is not complete.
    """
    attributes = read_attributes(root)
    if not attributes.complete:
        raise Conflict("the dataset is not complete", where=str(root), next="wait until it is written, or resume it")
    shards = [FileSum(entry.path, entry.bytes, entry.crc32c) for entry in read_manifest(root)]
    metadata = [file_sum(root, path) for path in [*_metadata_files(root, attributes), MANIFEST]]
    return [*metadata, *shards]


def _metadata_files(root: Path, attributes: DatasetAttributes) -> list[str]:
    if attributes.store == "hdf5":
        return [METADATA["hdf5"], *([INDEX] if (root / INDEX).exists() else [])]  # only a convenience
    folders = ("", "tokens/", "documents/", "activations/", *(f"{path}/" for path in array_paths(attributes)))
    return [f"{folder}zarr.json" for folder in folders]


def resolve_inside(root: Path, path: str) -> Path:
    """The file at `path` below `root`, for a path that came from elsewhere.

    Raises
    ------
    InvalidInput
        The path is absolute, empty, or leads out of `root`, by ``..`` or by a symbolic link.
    """
    relative = PurePosixPath(path)
    inside = root / relative
    if not relative.parts or relative.is_absolute() or ".." in relative.parts or "\0" in path:
        raise InvalidInput(f"{path!r} is not a path below the dataset", where=str(root))
    if not inside.resolve().is_relative_to(root.resolve()):
        raise InvalidInput(f"{path!r} leads out of the dataset", where=str(root))
    return inside


def verify_files(root: Path, files: Iterable[FileSum]) -> None:
    """Read `files` below `root` and compare sizes and checksums.

    Raises
    ------
    CorruptData
        Files are missing or differ; all of them are named.
    """
    problems = [f"{file.path}: {problem}" for file in files if (problem := file_problem(root, file))]
    if problems:
        raise CorruptData(
            f"{len(problems)} of the dataset's files do not match their checksums",
            where=str(root),
            why="\n".join(problems),
            next="fetch or write these files again",
        )


def file_problem(root: Path, expected: FileSum) -> str:
    """How a file differs in size and checksum; empty when it does not."""
    try:
        found = file_sum(root, str(resolve_inside(root, expected.path).relative_to(root)))
    except FileNotFoundError:
        return "missing"
    if found.bytes != expected.bytes:
        return f"{found.bytes} bytes, expected {expected.bytes}"
    return "" if found.crc32c == expected.crc32c else f"crc32c {found.crc32c}, expected {expected.crc32c}"
