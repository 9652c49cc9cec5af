"""Make the folder of a new dataset: its metadata, and the shards of tokens and documents.

The folder is built under a hidden name beside its place and renamed there when it is whole, so that a crash leaves no
half-made dataset.
"""

from __future__ import annotations

import shutil
from secrets import token_hex
from typing import TYPE_CHECKING, Any

import msgspec

from nnsight_hpc.storage import hdf5, zarr_metadata
from nnsight_hpc.storage.layout import BLOCK_ROWS, ArrayLayout, capture_chunk_rows, shard_rows, table_layout
from nnsight_hpc.storage.manifest import write_table_manifest
from nnsight_hpc.storage.schema import (
    FORMAT,
    FORMAT_VERSION,
    CaptureSpec,
    DatasetAttributes,
    Provenance,
    Store,
    check_captures,
    store_of,
)
from nnsight_hpc.storage.shards import ShardWriter, disk_errors
from nnsight_hpc.wire.errors import Conflict, InvalidInput, NotFound, TakenOver
from nnsight_hpc.wire.files import sync_folder

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy.typing as npt

    from nnsight_hpc.storage.tokens import TokenTable

_BYTES_OF_NOTHING = 8192
"""Bytes a token that decide on the slices of a dataset without captures of tokens: 65,536 tokens in 512 MiB."""


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
    store = store_of(path)
    _check_place(path)
    check_captures(captures)
    if min(shard_bytes, 1 if rows_per_slice is None else rows_per_slice) < 1:
        raise InvalidInput("shard_bytes and rows_per_slice must be at least 1")
    arrays = tokens.arrays()
    sizes = {"token": len(tokens.input_ids), "document": len(tokens.ids)}
    layouts, slice_rows = _capture_layouts(captures, sizes, rows_per_slice, shard_bytes, store)
    attributes = _attributes(captures, tokens, provenance, slice_rows, store)
    _check_slices(attributes)
    building = path.with_name(_building_name(path, token_hex(4)))
    try:
        with disk_errors(path):
            try:
                _build(building, attributes, layouts, arrays, writer)
                building.rename(path)
            except (OSError, TakenOver) as error:
                if path.exists():  # somebody was faster
                    raise _exists(path) from error
                raise
            sync_folder(path.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    _remove_unfinished(path)


def planned_layouts(
    captures: Sequence[CaptureSpec], tokens: TokenTable, *, rows_per_slice: int, shard_bytes: int, store: Store
) -> tuple[list[ArrayLayout], int]:
    """The arrays that a dataset is going to have, and the rows of a slice, as `create_dataset` would make them."""
    check_captures(captures)
    sizes = {"token": len(tokens.input_ids), "document": len(tokens.ids)}
    layouts, slice_rows = _capture_layouts(captures, sizes, rows_per_slice, shard_bytes, store)
    tables = [table_layout(path, array.shape, array.dtype.name, store) for path, array in tokens.arrays().items()]
    return [*tables, *layouts], slice_rows


def _check_place(path: Path) -> None:
    if path.exists():
        raise _exists(path)
    if not path.parent.is_dir():
        raise NotFound("the folder for the dataset does not exist", where=str(path.parent), next="create it first")


def _building_name(path: Path, attempt: str) -> str:
    return f".{path.name}.{attempt}.partial"


def _remove_unfinished(path: Path) -> None:
    """Remove what those have begun who were killed, or are too late."""
    for unfinished in path.parent.glob(_building_name(path, "[0-9a-f]" * 8)):
        shutil.rmtree(unfinished, ignore_errors=True)


def _exists(path: Path) -> Conflict:
    return Conflict(
        "a dataset of this name exists", where=str(path), next="choose another name, or resume it, or remove it first"
    )


def _attributes(
    captures: Sequence[CaptureSpec], tokens: TokenTable, provenance: Provenance, slice_rows: int, store: Store
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
        store=store,
    )


def _check_slices(attributes: DatasetAttributes) -> None:
    """Documents are computed by the slice in which they begin: without tokens there is none."""
    of_documents = any(capture.rows == "document" for capture in attributes.captures)
    if of_documents and attributes.documents and not attributes.rows:
        raise InvalidInput("captures of documents need documents that have tokens")


def _capture_layouts(
    captures: Sequence[CaptureSpec],
    sizes: dict[str, int],
    rows_per_slice: int | None,
    shard_bytes: int,
    store: Store,
) -> tuple[list[ArrayLayout], int]:
    """The layouts of the captures, and the rows of a slice; captures of tokens share one number of rows a shard."""
    tokens = rows_per_slice or sizes["token"]
    layouts = [_bare_layout(capture, sizes, tokens, store) for capture in captures]
    of_tokens = [layout for c, layout in zip(captures, layouts, strict=True) if c.rows == "token"]
    unit = max((layout.chunk_rows for layout in of_tokens), default=BLOCK_ROWS)
    widest = max((layout.row_bytes for layout in of_tokens), default=_BYTES_OF_NOTHING)
    shard = shard_rows(widest, tokens, unit, shard_bytes)
    whole = [
        msgspec.structs.replace(
            layout,
            shard_rows=shard
            if capture.rows == "token"
            else shard_rows(layout.row_bytes, layout.rows, layout.chunk_rows, shard_bytes),
        )
        for capture, layout in zip(captures, layouts, strict=True)
    ]
    return whole, -(-(rows_per_slice or shard) // shard) * shard


def _bare_layout(capture: CaptureSpec, sizes: dict[str, int], tokens: int, store: Store) -> ArrayLayout:
    """The layout of a capture whose shards are to be cut yet."""
    path, shape = f"activations/{capture.name}", (sizes[capture.rows], *capture.width_shape)
    layout = ArrayLayout(path, shape, capture.dtype, 1, 1, store)
    rows = tokens if capture.rows == "token" else layout.rows
    return msgspec.structs.replace(layout, chunk_rows=capture_chunk_rows(layout.row_bytes, rows))


def _build(
    folder: Path,
    attributes: DatasetAttributes,
    captures: list[ArrayLayout],
    arrays: dict[str, npt.NDArray[Any]],
    writer: str,
) -> None:
    tables = [table_layout(path, array.shape, array.dtype.name, attributes.store) for path, array in arrays.items()]
    metadata = hdf5 if attributes.store == "hdf5" else zarr_metadata
    folder.mkdir()
    metadata.write_metadata(folder, attributes, [*tables, *captures])
    entries = []
    for layout in tables:
        for shard in layout.shard_files(0, layout.rows):
            with ShardWriter(folder, shard) as shard_writer:
                shard_writer.write(shard.start, arrays[layout.path][shard.start : shard.stop])
                entries.append(shard_writer.seal(slice_number=None, writer=writer))
                shard_writer.publish()
    write_table_manifest(folder, entries)
