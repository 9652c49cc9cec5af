"""The manifest commits: a shard belongs to the dataset when a line here says so.

While a dataset is written, each slice has a file of its own, ``manifest/slice-000012.jsonl``, which appears in one step
after all of the slice's shards; ``manifest/tables.jsonl`` lists tokens and documents. At the end they are merged into
``manifest.jsonl``, and the root attribute `complete` becomes true.
"""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import msgspec

from nnsight_hpc.storage.layout import dataset_layouts
from nnsight_hpc.storage.schema import FILE_MODE, read_attributes
from nnsight_hpc.wire.errors import Conflict, CorruptData
from nnsight_hpc.wire.files import read_if_there, write_atomically

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

MANIFEST = "manifest.jsonl"
_PARTS = "manifest"
_SHOWN = 20


class ManifestEntry(msgspec.Struct, frozen=True):
    """A finished shard file.

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
        Number of the slice that it belongs to; None for tokens and documents.
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
    """Commit the shards of tokens and documents of a new dataset."""
    (root / _PARTS).mkdir()
    _write(root / _PARTS / "tables.jsonl", entries)


def write_slice_manifest(root: Path, number: int, entries: Iterable[ManifestEntry]) -> None:
    """Commit the shards of one slice."""
    _write(_slice_file(root, number), entries)


def remove_slice_manifest(root: Path, number: int) -> None:
    """Take a slice back, before it is written again."""
    (root / MANIFEST).unlink(missing_ok=True)  # there after a crash between the merge and `complete`
    _slice_file(root, number).unlink(missing_ok=True)


def slice_is_done(root: Path, number: int) -> bool:
    """Whether a slice is committed and its shards are there in full size."""
    raw = read_if_there(_slice_file(root, number))
    return raw is not None and not any(_damage(root, entry) for entry in _decode(raw, _slice_file(root, number)))


def read_manifest(root: Path) -> list[ManifestEntry]:
    """All committed shards of a dataset, complete or not.

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


def complete_dataset(root: Path) -> None:
    """Merge the manifest and set `complete`, if every planned shard is committed and there; again is harmless.

    Raises
    ------
    Conflict
        Shards are missing; the first of them are named.
    """
    attributes = read_attributes(root)
    if not attributes.complete:
        entries = _planned_entries(root)
        _write(root / MANIFEST, entries)
        _set_complete(root / "zarr.json")
    shutil.rmtree(root / _PARTS, ignore_errors=True)


def _planned_entries(root: Path) -> list[ManifestEntry]:
    committed = {entry.path: entry for entry in read_manifest(root)}
    entries, problems = [], []
    for layout in dataset_layouts(root, read_attributes(root)):
        for shard in range(layout.shards):
            path, planned = layout.shard_path(shard), (layout.shard_bounds(shard), layout.shard_bytes(shard))
            entry = committed.get(path)
            if entry is None:
                problems.append(f"{path}: not written")
            elif (entry.rows, entry.bytes) != planned:
                problems.append(
                    f"{path}: its manifest says rows {entry.rows}, {entry.bytes} bytes; planned are {planned}"
                )
            elif damage := _damage(root, entry):
                problems.append(damage)
            else:
                entries.append(entry)
    if problems:
        raise Conflict(
            f"the dataset is not whole: {len(problems)} shards are missing",
            where=str(root),
            why="\n".join(problems[:_SHOWN]),
            next="write the slices that are pending",
        )
    return entries


def _damage(root: Path, entry: ManifestEntry) -> str:
    try:
        size = (root / entry.path).stat().st_size
    except FileNotFoundError:
        return f"{entry.path}: the file is missing"
    return "" if size == entry.bytes else f"{entry.path}: {size} bytes, the manifest says {entry.bytes}"


def _set_complete(file: Path) -> None:
    metadata = msgspec.json.decode(file.read_bytes())
    metadata["attributes"] |= {"complete": True, "completed": datetime.now(UTC).isoformat(timespec="seconds")}
    write_atomically(file, msgspec.json.format(msgspec.json.encode(metadata), indent=2), mode=FILE_MODE)


def _slice_file(root: Path, number: int) -> Path:
    return root / _PARTS / f"slice-{number:06d}.jsonl"


def _write(file: Path, entries: Iterable[ManifestEntry]) -> None:
    write_atomically(file, msgspec.json.Encoder().encode_lines(entries), mode=FILE_MODE)


def _decode(raw: bytes, file: Path) -> list[ManifestEntry]:
    try:
        return msgspec.json.Decoder(ManifestEntry).decode_lines(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CorruptData("the dataset's manifest cannot be read", where=str(file), why=str(error)) from error
