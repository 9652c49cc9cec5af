"""Copy a dataset into the other store: the same rows, documents and provenance, in memory of bounded size."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from nnsight_hpc.storage.layout import dataset_layouts
from nnsight_hpc.storage.reader import ActivationDataset
from nnsight_hpc.storage.schema import read_attributes
from nnsight_hpc.storage.writer import DatasetWriter
from nnsight_hpc.wire.errors import Conflict

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from nnsight_hpc.storage.schema import DatasetAttributes
    from nnsight_hpc.storage.slices import SliceRange, SliceWriter

_BLOCK_BYTES = 8 << 20
_QUEUE_BYTES = 64 << 20


def convert_dataset(source: Path, target: Path, progress: Callable[[int, int], None]) -> None:
    """Copy the complete dataset `source` to `target`, Zarr or HDF5 as its ending says; goes on where it stopped.

    The copy has the slices and shards of its source, so that a dataset that is converted there and back has the same
    files again. Tokens and documents are held in memory, captures pass through it in blocks.

    Parameters
    ----------
    progress
        Called with the rows of tokens that are written, and all of them, after each slice.

    Raises
    ------
    NotFound, Incompatible, CorruptData
        `source` cannot be read.
    Conflict
        It is not complete; or `target` is complete, or holds something else.
    HpcError
        The disk is full.
    """
    dataset = ActivationDataset(source)
    writer = _writer(dataset, target)
    pending = writer.pending()
    for part in writer.slices:
        if part in pending:
            with writer.slice(part.number) as slice_writer:
                _copy(dataset, part, slice_writer)
        progress(part.stop, len(dataset))
    writer.finish()


def _writer(dataset: ActivationDataset, target: Path) -> DatasetWriter:
    if target.exists():
        if _content(read_attributes(target)) != _content(dataset.attributes):
            raise Conflict(
                "there is another dataset of this name", where=str(target), next="remove it, or rename one of them"
            )
        return DatasetWriter(target, queue_bytes=_QUEUE_BYTES)
    layouts = dataset_layouts(dataset.path, dataset.attributes)[-len(dataset.captures) :]
    return DatasetWriter.create(
        target,
        captures=dataset.attributes.captures,
        tokens=dataset.token_table(),
        provenance=dataset.provenance,
        rows_per_slice=dataset.attributes.slice_rows,
        shard_bytes=max(layout.shard_rows * layout.row_bytes for layout in layouts),
        queue_bytes=_QUEUE_BYTES,
    )


def _content(attributes: DatasetAttributes) -> DatasetAttributes:
    return msgspec.structs.replace(attributes, complete=True, completed="", store="zarr")


def _copy(dataset: ActivationDataset, part: SliceRange, writer: SliceWriter) -> None:
    for capture in dataset.attributes.captures:
        array = dataset[capture.name]
        start, stop = (part.start, part.stop) if capture.rows == "token" else part.documents
        step = max(1, _BLOCK_BYTES // array.row_bytes)
        for row in range(start, stop, step):
            writer.write(capture.name, row, array[row : min(row + step, stop)])
