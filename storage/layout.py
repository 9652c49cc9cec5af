"""How the rows of an array lie in shard files, and how many rows go into a chunk and a shard.

A shard file is raw rows in row-major order, in Zarr followed by the index of its chunks, in HDF5 behind a header; see
"Shard files" in `docs/spec/dataset.md`. Everything here is arithmetic on sizes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from nnsight_hpc.storage.schema import LOGICAL_DTYPES, METADATA, DatasetAttributes, Store, physical_dtype
from nnsight_hpc.wire.errors import CorruptData, Incompatible, InvalidInput
from nnsight_hpc.wire.files import read_if_there

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np

INDEX_ENTRY_BYTES = 16  # offset and size of a chunk, both uint64
CHECKSUM_BYTES = 4  # crc32c of the index
HDF5_HEADER_BYTES = 2048  # what HDF5 writes before the rows of a file that holds one contiguous dataset

BLOCK_ROWS = 256  # the smallest chunk, and the unit in which a reader shuffles
_CAPTURE_CHUNK_ROWS = 1024
_CAPTURE_CHUNK_BYTES = 1 << 20
_TABLE_CHUNK_ROWS = 1 << 16  # tokens and documents are narrow: larger chunks keep plain Zarr readers fast
_TABLE_CHUNK_BYTES = 1 << 18
_TABLE_SHARD_BYTES = 64 << 20


class ArrayLayout(msgspec.Struct, frozen=True):
    """One array of a dataset: its folder below the root, its shape, and its division into chunks and shards of rows."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    chunk_rows: int
    shard_rows: int
    store: Store = "zarr"

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def width_shape(self) -> tuple[int, ...]:
        return self.shape[1:]

    @property
    def physical(self) -> np.dtype[np.generic]:
        return physical_dtype(self.dtype)

    @property
    def row_bytes(self) -> int:
        return math.prod(self.width_shape) * self.physical.itemsize

    @property
    def shards(self) -> int:
        return -(-self.rows // self.shard_rows)

    @property
    def data_offset(self) -> int:
        """The byte of a shard file at which its rows begin."""
        return HDF5_HEADER_BYTES if self.store == "hdf5" else 0

    def shard_bounds(self, shard: int) -> tuple[int, int]:
        """First row of a shard, and the row after its last (the last shard may be cut short by the array's end)."""
        start = shard * self.shard_rows
        return start, min(start + self.shard_rows, self.rows)

    def shard_path(self, shard: int) -> str:
        """Path of a shard file below the root; in Zarr its chunk key, with ``.`` as the separator."""
        if self.store == "hdf5":
            return f"{self.path}/shard-{shard:06d}.h5"
        return f"{self.path}/c.{shard}" + ".0" * len(self.width_shape)

    def shard_file(self, shard: int) -> RowsFile:
        return RowsFile(self, self.shard_path(shard), *self.shard_bounds(shard), self.store)

    def shard_files(self, start: int, stop: int) -> list[RowsFile]:
        """The shards that hold rows ``start`` to ``stop - 1``."""
        return [self.shard_file(shard) for shard in range(start // self.shard_rows, -(-stop // self.shard_rows))]

    def shard_bytes(self, shard: int) -> int:
        return self.shard_file(shard).bytes

    @property
    def total_bytes(self) -> int:
        return sum(self.shard_bytes(shard) for shard in range(self.shards))


class RowsFile(msgspec.Struct, frozen=True):
    """A file of rows ``start`` to ``stop - 1`` of an array: a shard, or bare rows that wait for theirs (``raw``)."""

    array: ArrayLayout
    path: str
    start: int
    stop: int
    kind: Store | Literal["raw"]

    @property
    def data_offset(self) -> int:
        return 0 if self.kind == "raw" else self.array.data_offset

    @property
    def data_bytes(self) -> int:
        return (self.stop - self.start) * self.array.row_bytes

    @property
    def chunks(self) -> int:
        """How many chunks of a Zarr shard hold rows of the array; the others are marked empty in the index."""
        return -(-(self.stop - self.start) // self.array.chunk_rows)

    @property
    def bytes(self) -> int:
        """Size of the finished file: in Zarr whole chunks, the index, and its checksum."""
        if self.kind != "zarr":
            return self.data_offset + self.data_bytes
        data = self.chunks * self.array.chunk_rows * self.array.row_bytes
        return data + self.array.shard_rows // self.array.chunk_rows * INDEX_ENTRY_BYTES + CHECKSUM_BYTES


def capture_chunk_rows(row_bytes: int, rows: int) -> int:
    """Rows of a chunk of activations: 256 to 1,024, about 1 MiB or more, and no more than a small array needs."""
    return _chunk_rows(row_bytes, rows, _CAPTURE_CHUNK_BYTES, _CAPTURE_CHUNK_ROWS)


def table_layout(path: str, shape: tuple[int, ...], dtype: str, store: Store) -> ArrayLayout:
    """The layout of an array of tokens or documents, which is written at once when the dataset is created."""
    row_bytes = math.prod(shape[1:]) * physical_dtype(dtype).itemsize
    chunk = _chunk_rows(row_bytes, shape[0], _TABLE_CHUNK_BYTES, _TABLE_CHUNK_ROWS)
    return ArrayLayout(path, shape, dtype, chunk, shard_rows(row_bytes, shape[0], chunk, _TABLE_SHARD_BYTES), store)


def shard_rows(row_bytes: int, rows: int, unit: int, target_bytes: int) -> int:
    """Rows of a shard: a power of two times `unit`, at most `target_bytes`, and no more than `rows` need."""
    fits = max(1, target_bytes // (row_bytes * unit))
    needed = max(1, -(-rows // unit))
    return unit * min(1 << (fits.bit_length() - 1), needed)


def _chunk_rows(row_bytes: int, rows: int, target_bytes: int, most: int) -> int:
    wanted = min(most, max(1, target_bytes // row_bytes), max(1, rows))
    return max(BLOCK_ROWS, _next_power_of_two(wanted))


def _next_power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def dataset_layouts(root: Path, attributes: DatasetAttributes) -> list[ArrayLayout]:
    """The layouts of all arrays of a dataset, tokens and documents first, as their metadata say.

    Raises
    ------
    CorruptData
        An array's metadata is missing, cannot be decoded, or disagrees with the root's attributes.
    Incompatible
        An array is stored in another way than this program reads (compressed, for example).
    """
    read = _hdf5_layouts if attributes.store == "hdf5" else _zarr_layouts
    layouts = read(root, array_paths(attributes))
    captures = [(attributes.rows_of(c), c.width_shape, c.dtype) for c in attributes.captures]
    for layout, (rows, width, dtype) in zip(layouts, [*_table_rows(attributes), *captures], strict=True):
        if (layout.rows, layout.dtype) != (rows, dtype) or (width is not None and layout.width_shape != width):
            raise CorruptData(
                "an array does not have the shape and dtype that the dataset's attributes state",
                where=str(root / ("dataset.json" if layout.store == "hdf5" else f"{layout.path}/zarr.json")),
                why=f"found {layout.shape} {layout.dtype}, expected {rows} rows of {width} {dtype}",
            )
    return layouts


def array_paths(attributes: DatasetAttributes) -> list[str]:
    """The folders of all arrays of a dataset, below its root."""
    tables = ["tokens/input_ids", "tokens/document", "tokens/position", "documents/offset", "documents/id"]
    return tables + [f"activations/{capture.name}" for capture in attributes.captures]


def _table_rows(attributes: DatasetAttributes) -> Sequence[tuple[int, tuple[int, ...] | None, str]]:
    tokens: tuple[int, tuple[int, ...], str] = (attributes.rows, (), "int32")
    return (tokens, tokens, tokens, (attributes.documents + 1, (), "int64"), (attributes.documents, None, "uint8"))


class Hdf5Array(msgspec.Struct, frozen=True):
    """What ``dataset.json`` says of an array whose shards are HDF5 files."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    shard_rows: int


class Hdf5Arrays(msgspec.Struct, frozen=True):
    arrays: tuple[Hdf5Array, ...]


def _hdf5_layouts(root: Path, paths: Sequence[str]) -> list[ArrayLayout]:
    file = root / METADATA["hdf5"]
    try:
        arrays = {array.path: array for array in msgspec.json.decode(file.read_bytes(), type=Hdf5Arrays).arrays}
        return [_hdf5_layout(arrays[path]) for path in paths]
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, LookupError, ValueError, InvalidInput) as error:
        raise CorruptData("the arrays' metadata cannot be read", where=str(file), why=repr(error)) from error


def _hdf5_layout(array: Hdf5Array) -> ArrayLayout:
    physical_dtype(array.dtype)
    if array.shard_rows < 1:
        raise ValueError(f"{array.path}: {array.shard_rows} rows a shard")
    return ArrayLayout(array.path, array.shape, array.dtype, array.shard_rows, array.shard_rows, "hdf5")


class _Named(msgspec.Struct):
    name: str
    configuration: dict[str, Any] = {}


class _ArrayMetadata(msgspec.Struct):
    zarr_format: int
    shape: tuple[int, ...]
    data_type: str
    chunk_grid: _Named
    chunk_key_encoding: _Named
    codecs: list[_Named]
    attributes: dict[str, Any]


def _zarr_layouts(root: Path, paths: Sequence[str]) -> list[ArrayLayout]:
    return [_zarr_layout(root, path) for path in paths]


def _zarr_layout(root: Path, path: str) -> ArrayLayout:
    file = root / path / "zarr.json"
    raw = read_if_there(file) if file.parent.is_dir() else None
    if raw is None:
        raise CorruptData("an array of the dataset is missing", where=str(file))
    try:
        return _layout_of(msgspec.json.decode(raw, type=_ArrayMetadata), path, file)
    except (msgspec.DecodeError, UnicodeDecodeError, LookupError, TypeError, ValueError) as error:
        raise CorruptData("an array's metadata cannot be read", where=str(file), why=repr(error)) from error


def _layout_of(metadata: _ArrayMetadata, path: str, file: Path) -> ArrayLayout:
    sharding = metadata.codecs[0]
    if len(metadata.codecs) != 1 or sharding.name != "sharding_indexed" or not _is_raw(sharding.configuration):
        raise Incompatible(
            "the array is not stored as uncompressed shards", where=str(file), next="read it with zarr-python"
        )
    logical = str(metadata.attributes["logical_dtype"])
    if logical not in LOGICAL_DTYPES or physical_dtype(logical).name != metadata.data_type:
        raise CorruptData(f"dtype {metadata.data_type!r} does not hold {logical!r}", where=str(file))
    shard = tuple(metadata.chunk_grid.configuration["chunk_shape"])
    chunk = tuple(sharding.configuration["chunk_shape"])
    if shard[1:] != metadata.shape[1:] or chunk[1:] != metadata.shape[1:] or shard[0] % chunk[0]:
        why = f"chunks {chunk} in shards {shard} do not divide the rows of {metadata.shape}"
        raise CorruptData("an array's chunks are not rows", where=str(file), why=why)
    return ArrayLayout(path, metadata.shape, logical, chunk[0], shard[0])


def _is_raw(sharding: dict[str, Any]) -> bool:
    codecs = [(codec["name"], codec.get("configuration", {}).get("endian", "little")) for codec in sharding["codecs"]]
    return codecs == [("bytes", "little")] and sharding["index_location"] == "end"
