"""Arrays on disk that are indexed as NumPy arrays are, and read when they are.

A single random row costs about as much as 256 rows in a block: read blocks, and shuffle them through a buffer
(`ActivationDataset.to_torch`). Rows that are asked for by number are read in the order of the file, neighbours at once.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

from nnsight_hpc.storage.schema import numpy_dtype
from nnsight_hpc.wire.errors import InvalidInput, NotFound

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import dask.array
    import numpy.typing as npt
    import torch

    from nnsight_hpc.storage.files import Files
    from nnsight_hpc.storage.layout import ArrayLayout

    Rows = int | slice | Sequence[int] | npt.NDArray[Any]

_GAP_BYTES = 64 << 10  # between two rows that are asked for: reading it costs less than another read
_SPAN_BYTES = 8 << 20  # read at once, where only some of the rows are kept


class RowOutOfRange(InvalidInput, IndexError):
    """A row that the array does not have; ``except IndexError`` catches it."""


class StoredArray:
    """An array on disk, ``[rows, *width]``, in shards of raw rows: any range of rows is one read a shard.

    ``array[1000:2000]``, ``array[7]``, ``array[[3, 5, 9]]``, ``array[mask]``, ``array[::10, :64]`` give NumPy arrays.
    bfloat16 comes as `ml_dtypes.bfloat16`: ``.astype(np.float32)`` is exact, ``.view(np.uint16)`` gives the bits.
    `to_torch` gives tensors.

    Parameters
    ----------
    present
        The ranges of rows [start, stop) that are there, in order.

    Raises (when it is indexed)
    ---------------------------
    NotFound
        Rows are asked for that an incomplete dataset does not have yet.
    RowOutOfRange, InvalidInput
        There is no such row; or rows are chosen by something else than integers, a slice or a mask.
    CorruptData
        A file is missing, or too short.
    """

    def __init__(self, files: Files, layout: ArrayLayout, present: Sequence[tuple[int, int]]) -> None:
        self.shape, self.dtype, self.row_bytes = layout.shape, numpy_dtype(layout.dtype), layout.row_bytes
        self._files, self._layout, self._present = files, layout, present
        self._where = files.where(layout.path)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"<StoredArray {self._where} {self.shape} {self._layout.dtype}>"

    def __getitem__(self, key: Rows | tuple[Any, ...]) -> npt.NDArray[Any]:
        first, *rest = key if isinstance(key, tuple) else (key,)
        rows = self._rows(first)
        if not rest:
            return rows
        return rows[tuple(rest)] if isinstance(first, int | np.integer) else rows[(slice(None), *rest)]

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        """The whole array, read at once; ``np.asarray(array)`` would take it row by row otherwise."""
        return np.asarray(self[:], dtype=dtype)

    def to_numpy(self, rows: Rows = slice(None), dtype: npt.DTypeLike | None = None) -> npt.NDArray[Any]:
        """The rows in `dtype`, which has to hold every value exactly: ``np.float32`` for bfloat16, say.

        Raises
        ------
        InvalidInput
            The conversion could change values; do it yourself, knowing which: ``array[rows].astype(dtype)``.
        """
        wanted = self.dtype if dtype is None else np.dtype(dtype)
        if not np.can_cast(self.dtype, wanted, casting="safe"):
            raise InvalidInput(
                f"{wanted} does not hold every value of {self._layout.dtype}",
                where=self._where,
                next="convert the rows yourself: array[rows].astype(dtype)",
            )
        return self._rows(rows).astype(wanted, copy=False)

    def to_torch(self, rows: Rows = slice(None)) -> torch.Tensor:
        """The rows as a tensor of the capture's own dtype, `torch.bfloat16` included."""
        import torch  # noqa: PLC0415  (storage loads no torch before a tensor is asked for)

        bits = np.asarray(self._rows(rows))
        if self._layout.dtype == "bfloat16":
            return torch.from_numpy(bits.view(np.uint16)).view(torch.bfloat16)
        return torch.from_numpy(bits)

    def to_dask(self, rows_at_once: int | None = None) -> dask.array.Array:
        """A lazy dask array of blocks of `rows_at_once` rows (about 64 MiB when None); see `storage.lazy`."""
        from nnsight_hpc.storage.lazy import dask_array  # noqa: PLC0415  (dask is optional)

        return dask_array(self, rows_at_once)

    def read_into(self, start: int, buffer: npt.NDArray[Any]) -> None:
        """Fill `buffer` ``[n, *width]`` (contiguous, of this dtype) with rows ``start`` to ``start + n - 1``."""
        missing = list(_gaps(self._present, start, start + len(buffer)))
        if missing:
            ranges = ", ".join(f"{first} to {last - 1}" for first, last in missing[:10])
            raise NotFound(
                f"the dataset does not have rows {ranges} yet",
                where=self._where,
                next="read the ranges in `present`, or resume the dump that writes it",
            )
        if len(buffer):
            self._fill(start, buffer)

    def _fill(self, start: int, buffer: npt.NDArray[Any]) -> None:
        layout, stop = self._layout, start + len(buffer)
        for shard in range(start // layout.shard_rows, -(-stop // layout.shard_rows)):
            first, last = layout.shard_bounds(shard)
            low, high = max(start, first), min(stop, last)
            memory = buffer[low - start : high - start].reshape(-1).view(np.uint8).data
            self._files.read_into(layout.shard_path(shard), layout.data_offset + (low - first) * self.row_bytes, memory)

    def _rows(self, key: Rows) -> npt.NDArray[Any]:
        if isinstance(key, slice):
            return self._slice(range(len(self))[key])
        if isinstance(key, int | np.integer) and not isinstance(key, bool):
            row = int(self._positive(np.array([key]))[0])
            single: npt.NDArray[Any] = self._block(row, row + 1)[0]
            return single
        return self._gather(self._numbers(key))

    def _slice(self, rows: range) -> npt.NDArray[Any]:
        if abs(rows.step) > 1:
            return self._gather(np.arange(rows.start, rows.stop, rows.step))
        if rows.step == 1 or not rows:
            return self._block(rows.start, rows.start + len(rows))
        return self._block(rows[-1], rows[0] + 1)[::-1].copy()  # torch takes no negative strides

    def _numbers(self, key: npt.ArrayLike) -> npt.NDArray[Any]:
        rows = np.asarray(key)
        if rows.shape == (0,):
            return np.empty(0, dtype=np.int64)  # an empty list has no integers to show
        if rows.dtype == np.bool_ and rows.shape == (len(self),):
            return np.flatnonzero(rows)
        if rows.ndim != 1 or not np.issubdtype(rows.dtype, np.integer):
            raise InvalidInput(
                f"rows are chosen by an integer, a slice, integers or a mask of {len(self)} truth values, "
                f"not by {rows.dtype} {rows.shape}",
                where=self._where,
            )
        return self._positive(rows.astype(np.int64))

    def _positive(self, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
        bad = rows[(rows < -len(self)) | (rows >= len(self))]
        if len(bad):
            raise RowOutOfRange(f"there is no row {bad[0]}", where=self._where, why=f"it has {len(self)}")
        return np.where(rows < 0, rows + len(self), rows)

    def _block(self, start: int, stop: int) -> npt.NDArray[Any]:
        block = self._empty(stop - start)
        self.read_into(start, block)
        return block

    def _gather(self, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Rows by number, in any order: read in the order of the file, in spans of what lies close together."""
        gathered, order = self._empty(len(rows)), np.argsort(rows, kind="stable")
        ascending = rows[order]
        for first, last in self._spans(ascending):
            numbers = ascending[first:last]
            block = self._block(int(numbers[0]), int(numbers[-1]) + 1)
            gathered[order[first:last]] = block[numbers - numbers[0]]
        return gathered

    def _spans(self, ascending: npt.NDArray[Any]) -> Iterator[tuple[int, int]]:
        """Cut ascending row numbers into parts that are read at once: gaps, and the whole, are bounded in bytes."""
        gap, most = (max(1, size // self.row_bytes) for size in (_GAP_BYTES, _SPAN_BYTES))
        far = np.diff(ascending) > gap
        missing = np.searchsorted([start for start, _ in self._present], ascending, side="right")
        border = (np.diff(ascending // most) > 0) | (np.diff(missing) > 0)
        cuts = np.flatnonzero(far | border) + 1
        edges = [0, *cuts.tolist(), len(ascending)]
        return itertools.pairwise(edges) if len(ascending) else iter(())

    def _empty(self, rows: int) -> npt.NDArray[Any]:
        return np.empty((rows, *self.shape[1:]), dtype=self.dtype)


def _gaps(present: Iterable[tuple[int, int]], start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The parts of [start, stop) that no range of `present` (sorted) covers."""
    for first, last in present:
        if last <= start:
            continue
        if first >= stop:
            break
        if first > start:
            yield start, first
        start = max(start, last)
    if start < stop:
        yield start, stop
