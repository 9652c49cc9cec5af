"""Make a dataset complete: what is planned is compared with what is committed and there, in one step at the end.

Several workers may finish at the same time: each does the same, and the first one's word counts.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import msgspec

from nnsight_hpc.storage.documents import finish_documents, remove_leftovers
from nnsight_hpc.storage.hdf5 import write_index
from nnsight_hpc.storage.layout import dataset_layouts
from nnsight_hpc.storage.manifest import read_manifest, remove_manifest_parts, size_problem, write_manifest
from nnsight_hpc.storage.schema import FILE_MODE, METADATA, read_attributes
from nnsight_hpc.wire.errors import Conflict, HpcError
from nnsight_hpc.wire.files import write_atomically

if TYPE_CHECKING:
    from pathlib import Path

    from nnsight_hpc.storage.layout import ArrayLayout, RowsFile
    from nnsight_hpc.storage.manifest import ManifestEntry
    from nnsight_hpc.storage.schema import DatasetAttributes

_SHOWN = 20


def complete_dataset(root: Path, writer: str) -> None:
    """Merge the manifest and set `complete`, if every planned shard is committed and there; again is harmless.

    Raises
    ------
    Conflict
        Shards are missing; the first of them are named.
    """
    attributes = read_attributes(root)
    if not attributes.complete:
        try:
            _complete(root, attributes, writer)
        except (HpcError, OSError):
            if not read_attributes(root).complete:  # another worker was faster, and has removed the parts
                raise
    tidy_up(root)


def tidy_up(root: Path) -> None:
    """Remove from a complete dataset what was needed to write it; whoever completed it may have been killed before that."""
    remove_manifest_parts(root)
    remove_leftovers(root)


def set_complete(root: Path, attributes: DatasetAttributes, *, complete: bool) -> None:
    """Replace `complete` in the dataset's metadata, in one step."""
    file = root / METADATA[attributes.store]
    metadata = msgspec.json.decode(file.read_bytes())
    completed = datetime.now(UTC).isoformat(timespec="seconds") if complete else ""
    metadata["attributes"] |= {"complete": complete, "completed": completed}
    write_atomically(file, msgspec.json.format(msgspec.json.encode(metadata), indent=2), mode=FILE_MODE)


def _complete(root: Path, attributes: DatasetAttributes, writer: str) -> None:
    layouts = dataset_layouts(root, attributes)
    finish_documents(root, attributes, layouts, writer)
    write_manifest(root, _planned_entries(root, layouts))
    if attributes.store == "hdf5":
        write_index(root, attributes, layouts)
    set_complete(root, attributes, complete=True)


def _planned_entries(root: Path, layouts: list[ArrayLayout]) -> list[ManifestEntry]:
    committed = {entry.path: entry for entry in read_manifest(root)}
    planned = [shard for layout in layouts for shard in layout.shard_files(0, layout.rows)]
    problems = [f"{shard.path}: {problem}" for shard in planned if (problem := shard_problem(root, shard, committed))]
    if problems:
        raise Conflict(
            f"the dataset is not whole: {len(problems)} shards are missing",
            where=str(root),
            why="\n".join(problems[:_SHOWN]),
            next="write the slices that are pending",
        )
    return [committed[shard.path] for shard in planned]


def shard_problem(root: Path, shard: RowsFile, committed: dict[str, ManifestEntry]) -> str:
    """Why a planned shard is not whole, by its line in the manifest and the size of its file; empty when it is."""
    entry = committed.get(shard.path)
    if entry is None:
        return "not written"
    if (entry.rows, entry.bytes) != ((shard.start, shard.stop), shard.bytes):
        planned = ((shard.start, shard.stop), shard.bytes)
        return f"its manifest says rows {entry.rows}, {entry.bytes} bytes; planned are {planned}"
    return size_problem(root, entry)
