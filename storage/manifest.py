"""The manifest commits: a shard belongs to the dataset when a line here says so.

While a dataset is written, each slice has a file of its own, ``manifest/slice-000012.jsonl``, which appears in one step
after all of the slice's files; ``manifest/tables.jsonl`` lists what belongs to no slice. At the end they are merged into
``manifest.jsonl`` (`storage.finish`).
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import msgspec

from nnsight_hpc.storage.schema import FILE_MODE
from nnsight_hpc.wire.errors import CorruptData
from nnsight_hpc.wire.files import read_if_there, write_atomically

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from pathlib import Path

MANIFEST = "manifest.jsonl"
_PARTS = "manifest"


class ManifestEntry(msgspec.Struct, frozen=True):
    """A finished file: a shard, or rows of documents that wait for theirs.

    Parameters
    ----------
    path
        Path below the dataset's root, with ``/``.
    rows
        The array's rows that it holds: first, and one after the last.
    bytes
        Size of the file.
    crc32c
        Checksum of the whole file, 8 hexadecimal digits.
    slice
        Number of the slice that it belongs to; None for tokens, documents, and captures of documents.
    writer
        Who wrote it: host and process, or a Slurm job.
    time
        When it was finished, UTC, ISO 8601.
    """

    path: str
    rows: tuple[int, int]
    bytes: int
    crc32c: str
    slice: int | None
    writer: str
    time: str


def write_table_manifest(root: Path, entries: Iterable[ManifestEntry]) -> None:
    """Commit the shards that belong to no slice."""
    (root / _PARTS).mkdir(exist_ok=True)
    _write(root / _PARTS / "tables.jsonl", entries)


def write_slice_manifest(root: Path, number: int, entries: Iterable[ManifestEntry]) -> None:
    """Commit the files of one slice."""
    _write(_slice_file(root, number), entries)


def remove_slice_manifest(root: Path, number: int) -> None:
    """Take a slice back, before it is written again."""
    remove_whole_manifest(root)  # it is there after a crash between the merge and `complete`
    _slice_file(root, number).unlink(missing_ok=True)


def slice_is_done(root: Path, number: int) -> bool:
    """Whether a slice is committed and its files are there in full size."""
    raw = read_if_there(_slice_file(root, number))
    return raw is not None and not any(size_problem(root, entry) for entry in _decode(raw, _slice_file(root, number)))


def written_slices(root: Path) -> list[Path]:
    """The manifests of the slices that are committed, in a dataset that is not complete."""
    return sorted((root / _PARTS).glob("slice-*.jsonl"))


def read_manifest(root: Path) -> list[ManifestEntry]:
    """All committed files of a dataset, complete or not.

    Raises
    ------
    CorruptData
        A manifest file cannot be decoded.
    """
    whole = read_if_there(root / MANIFEST)
    if whole is not None:
        return _decode(whole, root / MANIFEST)
    parts = sorted((root / _PARTS).glob("*.jsonl"))
    return [entry for part in parts for entry in _decode(read_if_there(part) or b"", part)]


def write_manifest(root: Path, entries: Iterable[ManifestEntry]) -> None:
    """Write the manifest of a complete dataset."""
    _write(root / MANIFEST, entries)


def reopen_manifest(root: Path, *, without_slices: Collection[int], without_paths: Collection[str]) -> None:
    """Have a manifest for each slice again, but for some slices; what belongs to no slice stays, but for some paths."""
    entries = read_manifest(root)
    write_table_manifest(root, [one for one in entries if one.slice is None and one.path not in without_paths])
    for number in sorted({one.slice for one in entries if one.slice is not None}):
        if number in without_slices:
            _slice_file(root, number).unlink(missing_ok=True)
        else:
            write_slice_manifest(root, number, [one for one in entries if one.slice == number])


def remove_whole_manifest(root: Path) -> None:
    """Remove the manifest of a dataset that is no longer complete: its parts count now."""
    (root / MANIFEST).unlink(missing_ok=True)


def remove_manifest_parts(root: Path) -> None:
    """Remove what the manifest of a complete dataset has replaced."""
    shutil.rmtree(root / _PARTS, ignore_errors=True)


def size_problem(root: Path, entry: ManifestEntry) -> str:
    """What is wrong with the size of a committed file; empty when nothing is."""
    try:
        size = (root / entry.path).stat().st_size
    except FileNotFoundError:
        return "the file is missing"
    return "" if size == entry.bytes else f"{size} bytes, the manifest says {entry.bytes}"


def _slice_file(root: Path, number: int) -> Path:
    return root / _PARTS / f"slice-{number:06d}.jsonl"


def _write(file: Path, entries: Iterable[ManifestEntry]) -> None:
    write_atomically(file, msgspec.json.Encoder().encode_lines(entries), mode=FILE_MODE)


def _decode(raw: bytes, file: Path) -> list[ManifestEntry]:
    try:
        return msgspec.json.Decoder(ManifestEntry).decode_lines(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CorruptData("the dataset's manifest cannot be read", where=str(file), why=str(error)) from error
