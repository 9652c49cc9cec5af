"""Captures that have one row a document: which slice computes which, and how their shards come to be.

A slice holds the documents that begin in it, a number that differs from slice to slice, and shards have one size. So a
slice writes such rows to a file of its own below ``staged/``, and `finish_documents` joins these when the dataset is
finished; they are a small part of it.
"""

from __future__ import annotations

import shutil
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from nnsight_hpc.storage.arrays import StoredArray
from nnsight_hpc.storage.files import LocalFiles
from nnsight_hpc.storage.layout import RowsFile, dataset_layouts
from nnsight_hpc.storage.manifest import read_manifest, size_problem, write_table_manifest
from nnsight_hpc.storage.shards import ShardWriter
from nnsight_hpc.wire.errors import Conflict

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy.typing as npt

    from nnsight_hpc.storage.layout import ArrayLayout
    from nnsight_hpc.storage.manifest import ManifestEntry
    from nnsight_hpc.storage.schema import DatasetAttributes

_STAGED = "staged"
_BLOCK_BYTES = 8 << 20


def document_bounds(root: Path, attributes: DatasetAttributes) -> list[tuple[int, int]]:
    """For each slice the documents that begin in it, [first, stop); empty documents at the end belong to the last."""
    starts = document_starts(root, attributes)
    borders = np.searchsorted(starts, [attributes.slice_bounds(number)[0] for number in range(attributes.slices)])
    edges = [*borders.tolist(), attributes.documents]
    return list(pairwise(edges))


def document_starts(root: Path, attributes: DatasetAttributes) -> npt.NDArray[Any]:
    """The row with which each document begins."""
    layouts = {layout.path: layout for layout in dataset_layouts(root, attributes)}
    offset = layouts["documents/offset"]
    return StoredArray(LocalFiles(root), offset, [(0, offset.rows)])[:-1]


def staged_file(array: ArrayLayout, number: int, bounds: tuple[int, int]) -> RowsFile:
    """The file in which slice `number` leaves its rows of a capture of documents."""
    return RowsFile(array, f"{_STAGED}/{array.path.rpartition('/')[2]}/slice-{number:06d}.rows", *bounds, "raw")


def finish_documents(root: Path, attributes: DatasetAttributes, layouts: list[ArrayLayout], writer: str) -> None:
    """Join what the slices have staged into shards, and commit these; shards that are there already stay.

    Raises
    ------
    Conflict
        A slice that holds some of the rows is pending.
    """
    arrays = [
        layout
        for capture, layout in zip(attributes.captures, layouts[-len(attributes.captures) :], strict=True)
        if capture.rows == "document"
    ]
    if not arrays:
        return
    committed = {entry.path: entry for entry in read_manifest(root) if not size_problem(root, entry)}
    bounds = document_bounds(root, attributes)
    added = [
        _join(root, shard, [staged_file(array, number, part) for number, part in enumerate(bounds)], committed, writer)
        for array in arrays
        for shard in array.shard_files(0, array.rows)
        if shard.path not in committed
    ]
    write_table_manifest(root, [*(entry for entry in committed.values() if entry.slice is None), *added])


def remove_leftovers(root: Path) -> None:
    """Remove from a complete dataset the rows that have been joined, and what writers that were killed have left."""
    shutil.rmtree(root / _STAGED, ignore_errors=True)
    for partial in (*root.glob("*.partial"), *root.glob("activations/*/*.partial")):
        partial.unlink(missing_ok=True)


def _join(
    root: Path, shard: RowsFile, staged: list[RowsFile], committed: dict[str, ManifestEntry], writer: str
) -> ManifestEntry:
    with ShardWriter(root, shard) as target:
        for part in staged:
            start, stop = max(shard.start, part.start), min(shard.stop, part.stop)
            if start >= stop:
                continue
            if part.path not in committed:
                raise Conflict(
                    "the dataset is not whole",
                    where=str(root),
                    why=f"{part.path}: not written",
                    next="write the slices that are pending",
                )
            for row, block in _blocks(root, part, start, stop):
                target.write(row, block)
        entry = target.seal(slice_number=None, writer=writer)
        target.publish()
    return entry


def _blocks(root: Path, file: RowsFile, start: int, stop: int) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """Rows ``start`` to ``stop - 1`` of a file, in blocks of bounded size, each with its first row."""
    array, files = file.array, LocalFiles(root)
    step = max(1, _BLOCK_BYTES // array.row_bytes)
    for row in range(start, stop, step):
        block = np.empty((min(step, stop - row), *array.width_shape), dtype=array.physical)
        offset = file.data_offset + (row - file.start) * array.row_bytes
        files.read_into(file.path, offset, block.reshape(-1).view(np.uint8).data)
        yield row, block
