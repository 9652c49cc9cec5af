"""The metadata of a Zarr dataset, written by zarr-python."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import zarr

from nnsight_hpc.storage.schema import fill_value

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from nnsight_hpc.storage.layout import ArrayLayout
    from nnsight_hpc.storage.schema import DatasetAttributes


def write_metadata(folder: Path, attributes: DatasetAttributes, layouts: Sequence[ArrayLayout]) -> None:
    """Make the groups and arrays of a new dataset, without their shards."""
    root = zarr.create_group(str(folder), zarr_format=3, attributes=msgspec.to_builtins(attributes))
    for name in ("tokens", "documents", "activations"):
        root.create_group(name)
    of_documents = {f"activations/{capture.name}" for capture in attributes.captures if capture.rows == "document"}
    for layout in layouts:
        by_document = layout.path.startswith("documents/") or layout.path in of_documents
        _create_array(root, layout, "document" if by_document else "token")


def _create_array(root: zarr.Group, layout: ArrayLayout, row: str) -> None:
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
        dimension_names=(row, *_width_names(layout)),
        attributes={"logical_dtype": layout.dtype},
    )


def _width_names(layout: ArrayLayout) -> tuple[str, ...]:
    if len(layout.width_shape) == 1:
        return ("byte" if layout.path == "documents/id" else "d_model",)
    return tuple(f"dim_{axis}" for axis in range(1, len(layout.shape)))
