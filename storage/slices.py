"""Write the rows of one slice: blocks in any order, by a thread that writes while the producer computes.

A second thread has the disk take what is written, in steps, and seals shards that are full: so that little is left to be
waited for at the end of the slice.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import msgspec

from nnsight_hpc.storage.background import BackgroundThread
from nnsight_hpc.storage.manifest import remove_slice_manifest, write_slice_manifest
from nnsight_hpc.storage.schema import numpy_dtype
from nnsight_hpc.storage.shards import ShardWriter, disk_errors, remove_partials
from nnsight_hpc.wire.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType

    import numpy.typing as npt

    from nnsight_hpc.storage.layout import ArrayLayout, RowsFile
    from nnsight_hpc.storage.manifest import ManifestEntry


_SYNC_BYTES = 32 << 20
"""So much of a shard goes to the disk in one step."""


class SliceRange(msgspec.Struct, frozen=True):
    """A slice of the plan: its number, its rows [start, stop), and the documents [first, stop) that begin in them."""

    number: int
    start: int
    stop: int
    documents: tuple[int, int]


class SliceTarget(NamedTuple):
    """What a slice writes of one capture: rows [start, stop) in files; none, when no document begins in the slice."""

    array: ArrayLayout
    start: int
    stop: int
    files: list[RowsFile]


class SliceWriter:
    """Writes the rows of one slice; made by `DatasetWriter.slice`.

    The slice is committed when the block ends without an error. Otherwise its files are removed. Whoever begins it removes
    what others have begun, and its first file is made at once: so of two that write it at the same time, since one was
    taken for dead, the one that began last commits it, and the other one's `TakenOver` comes before it has changed a file.
    """

    def __init__(
        self, root: Path, part: SliceRange, targets: dict[str, SliceTarget], queue_bytes: int, writer: str
    ) -> None:
        self.range = part
        self._root, self._targets, self._queue_bytes, self._writer = root, targets, queue_bytes, writer
        self._shards: dict[str, ShardWriter] = {}
        self._entries: dict[str, ManifestEntry] = {}

    def __enter__(self) -> Self:
        with disk_errors(self._root):
            remove_slice_manifest(self._root, self.range.number)
            for file in self._planned():
                remove_partials(self._root, file)
                path = self._root / file.path
                for folder in (path.parent.parent, path.parent):
                    folder.mkdir(exist_ok=True)
            for file in self._planned()[:1]:
                self._open(file)
        self._thread, self._disk = BackgroundThread(self._queue_bytes), BackgroundThread(0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            self._thread.abandon()
            self._disk.abandon()
            for shard in self._shards.values():
                shard.__exit__(kind, error, trace)

    def write(self, capture: str, row: int, block: npt.NDArray[Any]) -> None:
        """Queue a capture's rows ``row`` to ``row + n - 1`` of the dataset; each is written once, in any order.

        Parameters
        ----------
        row
            Number of the token, or, for a capture of documents, of the document.
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
        for file in self._targets[capture].files:
            for first, last in _pieces(max(row, file.start), min(row + len(block), file.stop), rows_at_once):
                piece = block[first - row : last - row].view(layout.physical).copy()
                self._thread.submit(partial(self._write, file, first, piece), piece.nbytes)

    def _check(self, capture: str, row: int, block: npt.NDArray[Any]) -> ArrayLayout:
        if capture not in self._targets:
            raise InvalidInput(f"the dataset has no capture {capture!r}", why=f"it has {', '.join(self._targets)}")
        layout, start, stop, _ = self._targets[capture]
        if block.shape[1:] != layout.width_shape or block.ndim == 0:
            raise InvalidInput(
                f"a block of {capture!r} must have shape [rows, *{layout.width_shape}], not {block.shape}"
            )
        if block.dtype not in (layout.physical, numpy_dtype(layout.dtype)):
            raise InvalidInput(f"a block of {capture!r} must have dtype {layout.physical}, not {block.dtype}")
        if not start <= row <= row + len(block) <= stop:
            raise InvalidInput(
                f"rows {row} to {row + len(block) - 1} are not in slice {self.range.number}",
                why=f"it has rows {start} to {stop - 1} of {capture}",
            )
        return layout

    def _write(self, file: RowsFile, row: int, block: npt.NDArray[Any]) -> None:
        with disk_errors(self._root):
            shard = self._shards.get(file.path) or self._open(file)
            shard.write(row, block)
        if shard.full:
            self._disk.submit(partial(self._seal, file, shard), 0)
        elif shard.unsynced >= _SYNC_BYTES:
            shard.unsynced = 0
            self._disk.submit(partial(self._sync, shard), 0)

    def _sync(self, shard: ShardWriter) -> None:
        with disk_errors(self._root):
            shard.sync()

    def _seal(self, file: RowsFile, shard: ShardWriter) -> None:
        with disk_errors(self._root):
            self._entries[file.path] = shard.seal(slice_number=self.range.number, writer=self._writer)

    def _open(self, file: RowsFile) -> ShardWriter:
        return self._shards.setdefault(file.path, ShardWriter(self._root, file))

    def _planned(self) -> list[RowsFile]:
        return [file for target in self._targets.values() for file in target.files]

    def _commit(self) -> None:
        self._thread.finish()
        self._disk.finish()
        missing = [
            text
            for name, target in self._targets.items()
            for file in target.files
            for text in self._missing(name, file)
        ]
        if missing:
            raise InvalidInput(f"slice {self.range.number} lacks rows", where=str(self._root), why="\n".join(missing))
        planned = self._planned()
        with disk_errors(self._root):
            for file in planned:
                self._shards[file.path].publish()
            write_slice_manifest(self._root, self.range.number, [self._entries[file.path] for file in planned])

    def _missing(self, name: str, file: RowsFile) -> list[str]:
        shard = self._shards.get(file.path)
        ranges = [(file.start, file.stop)] if shard is None else shard.missing()
        return [f"{name}: rows {start} to {stop - 1}" for start, stop in ranges]


def _pieces(start: int, stop: int, most: int) -> Iterator[tuple[int, int]]:
    """Cut rows into ranges of at most `most` rows; there are none when `stop` is not above `start`."""
    for at in range(start, stop, most):
        yield at, min(at + most, stop)
