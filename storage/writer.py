"""Write a dataset: plan its slices, write each from its own process if need be, and commit the whole.

::

    writer = DatasetWriter.create(path, captures=[...], tokens=TokenTable(...), provenance=Provenance(...))
    for part in writer.pending():
        with writer.slice(part.number) as s:
            s.write("resid_10", row, block)
    writer.finish()

A slice is on disk and committed when its block ends. A thread writes while the producer computes; what waits for it is
bounded in bytes. After a crash, `DatasetWriter(path)` goes on with the slices that are pending.
"""

from __future__ import annotations

import os
import socket
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import msgspec

from nnsight_hpc.storage.background import BackgroundThread
from nnsight_hpc.storage.create import create_dataset
from nnsight_hpc.storage.layout import dataset_layouts
from nnsight_hpc.storage.manifest import complete_dataset, remove_slice_manifest, slice_is_done, write_slice_manifest
from nnsight_hpc.storage.schema import numpy_dtype, read_attributes
from nnsight_hpc.storage.shards import ShardWriter, disk_errors, remove_partials
from nnsight_hpc.wire.errors import Conflict, InvalidInput, NotFound

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType

    import numpy.typing as npt

    from nnsight_hpc.storage.layout import ArrayLayout
    from nnsight_hpc.storage.manifest import ManifestEntry
    from nnsight_hpc.storage.schema import CaptureSpec, Provenance
    from nnsight_hpc.storage.tokens import TokenTable

SHARD_BYTES = 512 << 20
QUEUE_BYTES = 256 << 20


class SliceRange(msgspec.Struct, frozen=True):
    """A slice of the plan: its number and its rows [start, stop)."""

    number: int
    start: int
    stop: int


class DatasetWriter:
    """A dataset that is being written; several processes may write different slices of it at the same time.

    Parameters
    ----------
    path
        An incomplete dataset, ``NAME.zarr``.
    queue_bytes
        Most bytes of blocks that wait for the writing thread of a slice.
    writer
        Name of this writer in the manifest; host and process id by default.

    Raises
    ------
    NotFound
        There is no dataset at `path`.
    Conflict
        It is complete.
    """

    def __init__(self, path: str | Path, *, queue_bytes: int = QUEUE_BYTES, writer: str = "") -> None:
        self.path = Path(path)
        self.attributes = read_attributes(self.path)
        if self.attributes.complete:
            raise Conflict(
                "the dataset is complete", where=str(self.path), next="choose another name for a new dataset"
            )
        layouts = dataset_layouts(self.path, self.attributes)
        self._captures = {
            capture.name: layout
            for capture, layout in zip(self.attributes.captures, layouts[-len(self.attributes.captures) :], strict=True)
        }
        self.planned_bytes = sum(layout.total_bytes for layout in layouts)
        self._queue_bytes = queue_bytes
        self._writer = writer or _this_process()

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        captures: Sequence[CaptureSpec],
        tokens: TokenTable,
        provenance: Provenance,
        rows_per_slice: int | None = None,
        shard_bytes: int = SHARD_BYTES,
        queue_bytes: int = QUEUE_BYTES,
        writer: str = "",
    ) -> Self:
        """Create a dataset with its tokens and documents, and open it for writing; see `create_dataset` for errors."""
        create_dataset(
            Path(path),
            captures,
            tokens,
            provenance,
            rows_per_slice=rows_per_slice,
            shard_bytes=shard_bytes,
            writer=writer or _this_process(),
        )
        return cls(path, queue_bytes=queue_bytes, writer=writer)

    @property
    def slices(self) -> list[SliceRange]:
        """The plan: all slices, in the order of rows."""
        return [SliceRange(number, *self.attributes.slice_bounds(number)) for number in range(self.attributes.slices)]

    def pending(self) -> list[SliceRange]:
        """The slices that no process has committed yet."""
        return [part for part in self.slices if not slice_is_done(self.path, part.number)]

    def slice(self, number: int) -> SliceWriter:
        """Begin a slice, as a context manager; what an earlier attempt left is removed.

        Raises
        ------
        NotFound
            The plan has no such slice.
        Conflict
            The slice is committed already.
        """
        if not 0 <= number < self.attributes.slices:
            raise NotFound(
                f"the dataset has no slice {number}", where=str(self.path), why=f"it has {self.attributes.slices}"
            )
        if slice_is_done(self.path, number):
            raise Conflict(f"slice {number} is written already", where=str(self.path), next="write the pending slices")
        part = SliceRange(number, *self.attributes.slice_bounds(number))
        return SliceWriter(self.path, part, self._captures, self._queue_bytes, self._writer)

    def finish(self) -> None:
        """Make the dataset complete.

        Raises
        ------
        Conflict
            Slices are pending.
        """
        with disk_errors(self.path):
            complete_dataset(self.path)


class SliceWriter:
    """Writes the rows of one slice; made by `DatasetWriter.slice`.

    The slice is committed when the block ends without an error. Otherwise its files are removed.
    """

    def __init__(
        self, root: Path, part: SliceRange, captures: dict[str, ArrayLayout], queue_bytes: int, writer: str
    ) -> None:
        self.range = part
        self._root, self._captures, self._queue_bytes, self._writer = root, captures, queue_bytes, writer
        self._shards: dict[tuple[str, int], ShardWriter] = {}
        self._entries: dict[str, ManifestEntry] = {}

    def __enter__(self) -> Self:
        with disk_errors(self._root):
            remove_slice_manifest(self._root, self.range.number)
            for name, shard in self._planned():
                remove_partials(self._root, self._captures[name], shard)
        self._thread = BackgroundThread(self._queue_bytes)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            self._thread.abandon()
            for shard in self._shards.values():
                shard.__exit__(kind, error, trace)

    def write(self, capture: str, row: int, block: npt.NDArray[Any]) -> None:
        """Queue the activations of the dataset's rows ``row`` to ``row + n - 1``; each row is written once, in any order.

        Parameters
        ----------
        block
            ``[n, *width_shape]`` in the capture's dtype; bfloat16 as its bits in uint16
            (``tensor.view(torch.uint16).numpy()``), or as `ml_dtypes.bfloat16`.
            It is copied, so that the caller may use its memory again.

        Raises
        ------
        InvalidInput
            Unknown capture, wrong shape or dtype, rows outside of the slice, or (from an earlier block) written twice.
        HpcError
            An earlier block could not be written: disk full, quota, an input or output error.
        """
        layout = self._check(capture, row, block)
        rows_at_once = max(1, self._queue_bytes // 4 // layout.row_bytes)
        for first, last in _pieces(row, row + len(block), rows_at_once, layout.shard_rows):
            piece = block[first - row : last - row].view(layout.physical).copy()
            self._thread.submit(partial(self._write, capture, first, piece), piece.nbytes)

    def _check(self, capture: str, row: int, block: npt.NDArray[Any]) -> ArrayLayout:
        layout = self._captures.get(capture)
        if layout is None:
            raise InvalidInput(f"the dataset has no capture {capture!r}", why=f"it has {', '.join(self._captures)}")
        if block.shape[1:] != layout.width_shape or block.ndim == 0:
            raise InvalidInput(
                f"a block of {capture!r} must have shape [rows, *{layout.width_shape}], not {block.shape}"
            )
        if block.dtype not in (layout.physical, numpy_dtype(layout.dtype)):
            raise InvalidInput(f"a block of {capture!r} must have dtype {layout.physical}, not {block.dtype}")
        if not self.range.start <= row <= row + len(block) <= self.range.stop:
            raise InvalidInput(
                f"rows {row} to {row + len(block) - 1} are not in slice {self.range.number}",
                why=f"it has rows {self.range.start} to {self.range.stop - 1}",
            )
        return layout

    def _write(self, capture: str, row: int, block: npt.NDArray[Any]) -> None:
        layout = self._captures[capture]
        number = row // layout.shard_rows
        with disk_errors(self._root):
            shard = self._shard(capture, number)
            shard.write(row, block)
            if shard.full:
                self._entries[layout.shard_path(number)] = shard.seal(
                    slice_number=self.range.number, writer=self._writer
                )

    def _shard(self, capture: str, number: int) -> ShardWriter:
        if (capture, number) not in self._shards:
            self._shards[capture, number] = ShardWriter(self._root, self._captures[capture], number)
        return self._shards[capture, number]

    def _planned(self) -> list[tuple[str, int]]:
        return [
            (name, shard)
            for name, layout in self._captures.items()
            for shard in range(self.range.start // layout.shard_rows, -(-self.range.stop // layout.shard_rows))
        ]

    def _commit(self) -> None:
        self._thread.finish()
        missing = [text for name, shard in self._planned() for text in self._missing(name, shard)]
        if missing:
            raise InvalidInput(f"slice {self.range.number} lacks rows", where=str(self._root), why="\n".join(missing))
        with disk_errors(self._root):
            for key in self._planned():
                self._shards[key].publish()
            entries = [self._entries[self._captures[name].shard_path(shard)] for name, shard in self._planned()]
            write_slice_manifest(self._root, self.range.number, entries)

    def _missing(self, name: str, number: int) -> list[str]:
        shard = self._shards.get((name, number))
        ranges = [self._captures[name].shard_bounds(number)] if shard is None else shard.missing()
        return [f"{name}: rows {start} to {stop - 1}" for start, stop in ranges]


def _pieces(start: int, stop: int, most: int, border: int) -> Iterator[tuple[int, int]]:
    """Cut rows into ranges of at most `most` rows that do not cross a multiple of `border`."""
    while start < stop:
        end = min(stop, start + most, (start // border + 1) * border)
        yield start, end
        start = end


def _this_process() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"
