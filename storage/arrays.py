"""Read rows of an array straight from its shard files, by position (pread).

A shard is raw rows, so that any range of rows is one read a shard. Memory maps are not used: cold on a disk they were 4
to 11 times slower, and they have hung on shared file systems. A single random row costs about as much as 256 rows in a
block: read blocks, and shuffle them through a buffer (`ActivationDataset.to_torch`).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from nnsight_hpc.storage.schema import numpy_dtype
from nnsight_hpc.wire.errors import CorruptData, InvalidInput, NotFound

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    import numpy.typing as npt
    import torch

    from nnsight_hpc.storage.layout import ArrayLayout

    Rows = int | slice | Sequence[int] | npt.NDArray[Any]


class RowOutOfRange(InvalidInput, IndexError):
    """A row that the array does not have; ``except IndexError`` catches it."""


class StoredArray:
    """An array on disk that is indexed like a NumPy array, and read when it is.

    ``array[1000:2000]``, ``array[7]``, ``array[[3, 5, 9]]``, ``array[0:10, :64]`` give NumPy arrays. bfloat16 comes as
    `ml_dtypes.bfloat16`: ``.astype(np.float32)`` is exact, ``.view(np.uint16)`` gives the bits. `to_torch` gives tensors.

    Raises (when it is indexed)
    ---------------------------
    NotFound
        Rows are asked for that an incomplete dataset does not have yet.
    CorruptData
        A shard file is missing, or too short.
    """

    def __init__(self, root: Path, layout: ArrayLayout, present: Sequence[tuple[int, int]]) -> None:
        self._root, self._layout, self._present = root, layout, present

    @property
    def shape(self) -> tuple[int, ...]:
        return self._layout.shape

    @property
    def dtype(self) -> np.dtype[np.generic]:
        return numpy_dtype(self._layout.dtype)

    def __len__(self) -> int:
        return self._layout.rows

    def __repr__(self) -> str:
        return f"<StoredArray {self._layout.path} {self.shape} {self._layout.dtype}>"

    def __getitem__(self, key: Rows | tuple[Any, ...]) -> npt.NDArray[Any]:
        first, *rest = key if isinstance(key, tuple) else (key,)
        rows = self._rows(first)
        if not rest:
            return rows
        return rows[tuple(rest)] if isinstance(first, int | np.integer) else rows[(slice(None), *rest)]

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        """The whole array, read at once; ``np.asarray(array)`` would take it row by row otherwise."""
        return np.asarray(self[:], dtype=dtype)

    def to_torch(self, rows: Rows = slice(None)) -> torch.Tensor:
        """The rows as a tensor of the capture's own dtype, `torch.bfloat16` included."""
        import torch  # noqa: PLC0415  (storage loads no torch before a tensor is asked for)

        bits = np.asarray(self._rows(rows))
        if self._layout.dtype == "bfloat16":
            return torch.from_numpy(bits.view(np.uint16)).view(torch.bfloat16)
        return torch.from_numpy(bits)

    def read_into(self, start: int, buffer: npt.NDArray[Any]) -> None:
        """Fill `buffer` ``[n, *width]`` (contiguous, of this dtype) with rows ``start`` to ``start + n - 1``."""
        stop = start + len(buffer)
        missing = list(_gaps(self._present, start, stop))
        if missing:
            ranges = ", ".join(f"{first} to {last - 1}" for first, last in missing[:10])
            raise NotFound(
                f"the dataset does not have rows {ranges} yet",
                where=str(self._root / self._layout.path),
                next="read the ranges in `present`, or resume the dump that writes it",
            )
        for shard in range(start // self._layout.shard_rows, -(-stop // self._layout.shard_rows)):
            first, last = self._layout.shard_bounds(shard)
            low, high = max(start, first), min(stop, last)
            self._read_shard(shard, low - first, buffer[low - start : high - start])

    def _rows(self, key: Rows) -> npt.NDArray[Any]:
        if isinstance(key, slice):
            return self._slice(*key.indices(len(self)))
        if isinstance(key, int | np.integer):
            row = int(self._positive(np.array([int(key)]))[0])
            single: npt.NDArray[Any] = self._read([(row, row + 1)])[0]
            return single
        rows = np.asarray(key if len(key) else np.empty(0, dtype=np.int64))
        if rows.ndim != 1 or not np.issubdtype(rows.dtype, np.integer):
            raise InvalidInput(f"rows are chosen by an integer, a slice or integers, not by {rows.dtype} {rows.shape}")
        return self._read(_runs(self._positive(rows)))

    def _slice(self, start: int, stop: int, step: int) -> npt.NDArray[Any]:
        rows = range(start, stop, step)
        if not rows:
            return self._read([])
        if abs(step) > 1:
            return self._read([(row, row + 1) for row in rows])
        block = self._read([(min(rows[0], rows[-1]), max(rows[0], rows[-1]) + 1)])
        return block if step == 1 else block[::-1].copy()  # torch takes no negative strides

    def _positive(self, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
        bad = rows[(rows < -len(self)) | (rows >= len(self))]
        if len(bad):
            raise RowOutOfRange(
                f"there is no row {bad[0]}", where=str(self._root / self._layout.path), why=f"it has {len(self)}"
            )
        return np.where(rows < 0, rows + len(self), rows)

    def _read(self, runs: Sequence[tuple[int, int]]) -> npt.NDArray[Any]:
        total = sum(stop - start for start, stop in runs)
        rows = np.empty((total, *self._layout.width_shape), dtype=self.dtype)
        at = 0
        for start, stop in runs:
            self.read_into(start, rows[at : at + stop - start])
            at += stop - start
        return rows

    def _read_shard(self, shard: int, row: int, buffer: npt.NDArray[Any]) -> None:
        path = self._root / self._layout.shard_path(shard)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise CorruptData(
                "a shard of the dataset is missing", where=str(path), next="fetch or write it again"
            ) from error
        try:
            view, offset = buffer.reshape(-1).view(np.uint8).data, row * self._layout.row_bytes
            while view:
                count = os.preadv(descriptor, [view], offset)
                if not count:
                    raise CorruptData(
                        "a shard of the dataset is too short", where=str(path), next="fetch or write it again"
                    )
                view, offset = view[count:], offset + count
        finally:
            os.close(descriptor)


def _runs(rows: npt.NDArray[Any]) -> list[tuple[int, int]]:
    """Cut row numbers into ranges of neighbours, in their order."""
    if not len(rows):
        return []
    cuts = np.flatnonzero(np.diff(rows) != 1) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(rows, cuts)]


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
