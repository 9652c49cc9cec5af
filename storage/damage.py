"""Find the damaged files of a dataset, and have the slices that they belong to written again.

``verify`` reads every file that is committed and compares it with the manifest. ``repair`` takes the damaged slices out
of the manifest and removes no file: a dump that is started again writes these slices, and no other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from nnsight_hpc.storage.checksums import FileSum, file_problem
from nnsight_hpc.storage.documents import document_bounds, document_starts
from nnsight_hpc.storage.finish import set_complete, shard_problem
from nnsight_hpc.storage.layout import dataset_layouts
from nnsight_hpc.storage.manifest import read_manifest, remove_whole_manifest, reopen_manifest
from nnsight_hpc.storage.schema import read_attributes
from nnsight_hpc.storage.shards import disk_errors
from nnsight_hpc.wire.errors import CorruptData, HpcError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from nnsight_hpc.storage.layout import RowsFile
    from nnsight_hpc.storage.manifest import ManifestEntry
    from nnsight_hpc.storage.schema import DatasetAttributes


class Damage(msgspec.Struct, frozen=True):
    """A file of a dataset that is missing or differs from the manifest.

    Parameters
    ----------
    path
        Path below the dataset's root.
    problem
        What is wrong with it.
    slices
        The slices that have to be written again for it; none for tokens and documents, which no slice writes.
    rows
        The rows of its array that it holds: first, and one after the last.
    documents
        The documents that these rows belong to, in the same way; none for a file of no capture.
    """

    path: str
    problem: str
    slices: tuple[int, ...]
    rows: tuple[int, int] = (0, 0)
    documents: tuple[int, int] = (0, 0)


def find_damage(root: Path, progress: Callable[[int, int], None] = lambda _done, _total: None) -> list[Damage]:
    """Read every file that has to be there, and compare it with the manifest.

    In a complete dataset these are all shards, in another one those of the slices that are committed.

    Parameters
    ----------
    progress
        Takes how many bytes have been read, after each file, and of how many.

    Raises
    ------
    NotFound, Incompatible, CorruptData
        There is no dataset, or its metadata or manifest cannot be used.
    """
    attributes = read_attributes(root)
    committed = {entry.path: entry for entry in read_manifest(root)}
    shards = {
        shard.path: shard for array in dataset_layouts(root, attributes) for shard in array.shard_files(0, array.rows)
    }
    problems = dict(_problems(root, shards if attributes.complete else {}, committed, progress))
    found = []
    for path, problem in problems.items():
        shard, entry = shards.get(path), committed.get(path)
        rows = entry.rows if entry else (shard.start, shard.stop) if shard else (0, 0)
        slices = tuple(_slices(root, attributes, shard, entry))
        found.append(Damage(path, problem, slices, rows, _documents(root, attributes, path, rows)))
    return found


def repair(root: Path, damage: Sequence[Damage] | None = None) -> list[int]:
    """Take damaged slices out of the manifest, so that a dump goes on with just these; their numbers, in order.

    A complete dataset is incomplete then, until the slices are written and `DatasetWriter.finish` is called. Files are
    left as they are: what is whole stays, and what is damaged is replaced when its slice is written.

    Parameters
    ----------
    damage
        What `find_damage` has found just now; None: it looks.

    Raises
    ------
    CorruptData
        Tokens or documents are damaged, which no slice writes.
    NotFound, Incompatible
        There is no dataset, or its metadata cannot be used.
    HpcError
        The manifest cannot be written.
    """
    damage = find_damage(root) if damage is None else damage
    lost = [f"{one.path}: {one.problem}" for one in damage if not one.slices]
    if lost:
        raise CorruptData(
            "tokens or documents of the dataset are damaged, which no slice writes again",
            where=str(root),
            why="\n".join(lost),
            next="remove the dataset, and fetch or dump it again",
        )
    slices = sorted({number for one in damage for number in one.slices})
    if slices:
        attributes = read_attributes(root)
        with disk_errors(root):
            reopen_manifest(root, without_slices=slices, without_paths={one.path for one in damage})
            if attributes.complete:
                set_complete(root, attributes, complete=False)
            remove_whole_manifest(root)
    return slices


def _problems(
    root: Path,
    planned: dict[str, RowsFile],
    committed: dict[str, ManifestEntry],
    progress: Callable[[int, int], None],
) -> Iterator[tuple[str, str]]:
    for path, shard in planned.items():
        if problem := shard_problem(root, shard, committed):
            yield path, problem
    done, total = 0, sum(entry.bytes for entry in committed.values())
    for path, entry in committed.items():
        if problem := file_problem(root, FileSum(path, entry.bytes, entry.crc32c)):
            yield path, problem
        done += entry.bytes
        progress(done, total)


def _documents(root: Path, attributes: DatasetAttributes, path: str, rows: tuple[int, int]) -> tuple[int, int]:
    """The documents that have some of these rows; none where it cannot be said."""
    kinds = {f"activations/{capture.name}": capture.rows for capture in attributes.captures}
    kind = kinds.get(path.rpartition("/")[0])
    if kind != "token":
        return rows if kind == "document" else (0, 0)
    try:
        starts = document_starts(root, attributes)
    except HpcError:  # where documents begin is damaged, too
        return 0, 0
    first, last = (int(starts.searchsorted(row, side="right")) for row in (rows[0], rows[1] - 1))
    return first - 1, last


def _slices(
    root: Path, attributes: DatasetAttributes, shard: RowsFile | None, entry: ManifestEntry | None
) -> Iterator[int]:
    """The slices whose rows a file holds."""
    if entry is not None and entry.slice is not None:
        yield entry.slice
        return
    captures = {f"activations/{capture.name}": capture for capture in attributes.captures}
    capture = captures.get(shard.array.path) if shard else None
    if shard is None or capture is None:
        return
    tokens = [attributes.slice_bounds(number) for number in range(attributes.slices)]
    bounds = tokens if capture.rows == "token" else document_bounds(root, attributes)
    yield from (number for number, (start, stop) in enumerate(bounds) if start < shard.stop and stop > shard.start)
