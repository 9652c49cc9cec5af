"""Make the folder of a new dataset: metadata by zarr-python, tokens and documents by our own shard writer.

The folder is built under a hidden name beside its place and renamed there when it is whole, so that a crash leaves no
half-made dataset.
"""

from __future__ import annotations

import shutil
from secrets import token_hex
from typing import TYPE_CHECKING, Any

import msgspec
import zarr

from nnsight_hpc.storage.layout import ArrayLayout, capture_chunk_rows, shard_rows, table_layout
from nnsight_hpc.storage.manifest import write_table_manifest
from nnsight_hpc.storage.schema import (
    FORMAT,
    FORMAT_VERSION,
    CaptureSpec,
    DatasetAttributes,
    Provenance,
    check_captures,
    dataset_folder,
    fill_value,
)
from nnsight_hpc.storage.shards import ShardWriter, disk_errors
from nnsight_hpc.wire.errors import Conflict, InvalidInput, NotFound
from nnsight_hpc.wire.files import sync_folder

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy.typing as npt

    from nnsight_hpc.storage.tokens import TokenTable


def create_dataset(
    path: Path,
    captures: Sequence[CaptureSpec],
    tokens: TokenTable,
    provenance: Provenance,
    *,
    rows_per_slice: int | None,
    shard_bytes: int,
    writer: str,
) -> None:
    """Create the incomplete dataset `path`, with its tokens and documents, and no activations yet.

    Parameters
    ----------
    rows_per_slice
        Rows of a slice, rounded up to whole shards (at least 256 rows); one shard each when None.
    shard_bytes
        About the largest size of a shard file, in bytes.

    Raises
    ------
    Conflict
        `path` exists.
    InvalidInput
        The name, a capture or the tokens cannot be stored.
    NotFound
        The folder that should hold the dataset does not exist.
    """
    _check_place(path)
    check_captures(captures)
    if min(shard_bytes, 1 if rows_per_slice is None else rows_per_slice) < 1:
        raise InvalidInput("shard_bytes and rows_per_slice must be at least 1")
    arrays = tokens.arrays()
    layouts, slice_rows = _capture_layouts(captures, len(tokens.input_ids), rows_per_slice, shard_bytes)
    attributes = _attributes(captures, tokens, provenance, slice_rows)
    building = path.with_name(f".{path.name}.{token_hex(4)}.partial")
    try:
        with disk_errors(path):
            _build(building, attributes, layouts, arrays, writer)
            _move_into_place(building, path)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _check_place(path: Path) -> None:
    if dataset_folder(path.parent, path.name.removesuffix(".zarr")) != path:
        raise InvalidInput("the folder of a dataset must end in .zarr", where=str(path))
    if path.exists():
        raise _exists(path)
    if not path.parent.is_dir():
        raise NotFound("the folder for the dataset does not exist", where=str(path.parent), next="create it first")


def _exists(path: Path) -> Conflict:
    return Conflict(
        "a dataset of this name exists", where=str(path), next="choose another name, or resume it, or remove it first"
    )


def _attributes(
    captures: Sequence[CaptureSpec], tokens: TokenTable, provenance: Provenance, slice_rows: int
) -> DatasetAttributes:
    return DatasetAttributes(
        format=FORMAT,
        format_version=FORMAT_VERSION,
        complete=False,
        rows=len(tokens.input_ids),
        documents=len(tokens.ids),
        slice_rows=slice_rows,
        captures=tuple(captures),
        provenance=provenance,
    )


def _capture_layouts(
    captures: Sequence[CaptureSpec], rows: int, rows_per_slice: int | None, shard_bytes: int
) -> tuple[list[ArrayLayout], int]:
    """The layouts of the captures, which share one number of rows a shard, and the rows of a slice."""
    bare = [ArrayLayout(f"activations/{c.name}", (rows, *c.width_shape), c.dtype, 1, 1) for c in captures]
    chunks = [capture_chunk_rows(layout.row_bytes, rows_per_slice or rows) for layout in bare]
    unit, widest = max(chunks), max(layout.row_bytes for layout in bare)
    shard = shard_rows(widest, rows_per_slice or rows, unit, shard_bytes)
    slice_rows = -(-(rows_per_slice or shard) // shard) * shard
    layouts = [
        msgspec.structs.replace(layout, chunk_rows=chunk, shard_rows=shard)
        for layout, chunk in zip(bare, chunks, strict=True)
    ]
    return layouts, slice_rows


def _build(
    folder: Path,
    attributes: DatasetAttributes,
    captures: list[ArrayLayout],
    arrays: dict[str, npt.NDArray[Any]],
    writer: str,
) -> None:
    root = zarr.create_group(str(folder), zarr_format=3, attributes=msgspec.to_builtins(attributes))
    for name in ("tokens", "documents", "activations"):
        root.create_group(name)
    tables = [table_layout(path, array.shape, array.dtype.name) for path, array in arrays.items()]
    for layout in [*tables, *captures]:
        _create_array(root, layout)
    entries = []
    for layout in tables:
        for shard in range(layout.shards):
            start, stop = layout.shard_bounds(shard)
            with ShardWriter(folder, layout, shard) as shard_writer:
                shard_writer.write(start, arrays[layout.path][start:stop])
                entries.append(shard_writer.seal(slice_number=None, writer=writer))
                shard_writer.publish()
    write_table_manifest(folder, entries)


def _create_array(root: zarr.Group, layout: ArrayLayout) -> None:
    width = layout.width_shape
    root.create_array(
        layout.path,
        shape=layout.shape,
        dtype=layout.physical,
        chunks=(layout.chunk_rows, *width),
        shards=(layout.shard_rows, *width),
        compressors=None,
        filters=None,
        fill_value=fill_value(layout.dtype),
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=_dimension_names(layout),
        attributes={"logical_dtype": layout.dtype},
    )


def _dimension_names(layout: ArrayLayout) -> tuple[str, ...]:
    row, column = ("document", "byte") if layout.path.startswith("documents/") else ("token", "d_model")
    if len(layout.width_shape) == 1:
        return (row, column)
    return (row, *(f"dim_{axis}" for axis in range(1, len(layout.shape))))


def _move_into_place(building: Path, path: Path) -> None:
    try:
        building.rename(path)
    except OSError as error:
        if path.exists():  # somebody was faster
            raise _exists(path) from error
        raise
    sync_folder(path.parent)
