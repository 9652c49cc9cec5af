"""Write one process's share of the files of a slice: blocks in any order, by a thread that writes while the producer computes.

A second thread has the disk take what is written, in steps, and seals shards that are full: so that little is left to be
waited for at the end of the slice.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnsight_hpc.storage.background import BackgroundThread
from nnsight_hpc.storage.schema import numpy_dtype
from nnsight_hpc.storage.shards import ShardWriter, disk_errors
from nnsight_hpc.wire.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import numpy.typing as npt

    from nnsight_hpc.storage.layout import ArrayLayout, RowsFile
    from nnsight_hpc.storage.manifest import ManifestEntry
    from nnsight_hpc.storage.slices import SlicePlan

_SYNC_BYTES = 32 << 20
"""So much of a file goes to the disk in one step; less, where many files are written at the same time."""
_UNSYNCED_BYTES = 256 << 20
"""So much may lie in the page cache that the disk has not begun to take, and so much that it has."""


class ShareWriter:
    """Writes the files of a plan, of which the first is made at once; to be closed whatever happens.

    Parameters
    ----------
    writer
        Name of this writer in the manifest.

    Raises
    ------
    HpcError
        The first file cannot be made.
    """

    def __init__(self, plan: SlicePlan, writer: str) -> None:
        self._plan, self._writer, self._root = plan, writer, Path(plan.root)
        self._shards: dict[str, ShardWriter] = {}
        self._entries: dict[str, ManifestEntry] = {}
        with disk_errors(self._root):
            for file in plan.files[:1]:
                self._open(file)
        self._thread = BackgroundThread(plan.queue_bytes, "dataset-writer")
        self._disk = BackgroundThread(_UNSYNCED_BYTES, "dataset-disk")

    def own(self, capture: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Which of a capture's rows ``start`` to ``stop - 1`` are in this process's files: ranges [start, stop)."""
        for file in self._plan.targets[capture].files:
            first, last = max(start, file.start), min(stop, file.stop)
            if first < last:
                yield first, last

    def write(self, capture: str, row: int, block: npt.NDArray[Any]) -> None:
        """As `SliceWriter.write`; rows that are in others' files are left out."""
        layout = self._check(capture, [(row, row + (len(block) if block.ndim else 0))], block)
        rows_at_once = max(1, self._plan.queue_bytes // 4 // layout.row_bytes)
        for start, stop in self.own(capture, row, row + len(block)):
            for first, last in _pieces(start, stop, rows_at_once):
                self.hand_over(capture, [(first, last)], block[first - row : last - row].copy())

    def hand_over(self, capture: str, ranges: Sequence[tuple[int, int]], block: npt.NDArray[Any]) -> None:
        """Queue rows that are in this process's files: those of each range [start, stop), one range after another in `block`.

        Nobody may change the block any more: it is not copied. Raises as `SliceWriter.write`.
        """
        content = block.view(self._check(capture, ranges, block).physical)
        self._thread.submit(partial(self._write_ranges, capture, _joined(ranges), content), content.nbytes)

    def seal(self) -> list[ManifestEntry]:
        """Wait until everything is on the disk, and nothing is missing; what is to be said of the files.

        Raises
        ------
        InvalidInput
            Rows were not written.
        HpcError
            A block could not be written.
        """
        self._thread.finish()
        self._disk.finish()
        missing = [
            text
            for name, target in self._plan.targets.items()
            for file in target.files
            for text in self._missing(name, file)
        ]
        if missing:
            raise InvalidInput(
                f"slice {self._plan.range.number} lacks rows", where=str(self._root), why="\n".join(missing)
            )
        return [self._entries[file.path] for file in self._plan.files]

    def publish(self) -> None:
        """Give the files their names, once all files of the slice are sealed; raises `TakenOver`."""
        with disk_errors(self._root):
            for file in self._plan.files:
                self._shards[file.path].publish()

    def close(self) -> None:
        """Drop what waits, and remove the files that have no name yet."""
        self._thread.abandon()
        self._disk.abandon()
        for shard in self._shards.values():
            shard.__exit__(None, None, None)

    def _check(self, capture: str, ranges: Sequence[tuple[int, int]], block: npt.NDArray[Any]) -> ArrayLayout:
        targets = self._plan.targets
        if capture not in targets:
            raise InvalidInput(f"the dataset has no capture {capture!r}", why=f"it has {', '.join(targets)}")
        target = targets[capture]
        layout, start, stop = target.array, target.start, target.stop
        if block.shape != (sum(last - first for first, last in ranges), *layout.width_shape):
            raise InvalidInput(
                f"a block of {capture!r} must have shape [rows, *{layout.width_shape}], not {block.shape}"
            )
        if block.dtype not in (layout.physical, numpy_dtype(layout.dtype)):
            raise InvalidInput(f"a block of {capture!r} must have dtype {layout.physical}, not {block.dtype}")
        for first, last in ranges:
            if not start <= first <= last <= stop:
                raise InvalidInput(
                    f"rows {first} to {last - 1} are not in slice {self._plan.range.number}",
                    why=f"it has rows {start} to {stop - 1} of {capture}",
                )
        return layout

    def _write_ranges(self, capture: str, ranges: Sequence[tuple[int, int]], block: npt.NDArray[Any]) -> None:
        at = 0
        for start, stop in ranges:
            for file in self._plan.targets[capture].files:
                first, last = max(start, file.start), min(stop, file.stop)
                if first < last:
                    self._write(file, first, block[at + first - start : at + last - start])
            at += stop - start

    def _write(self, file: RowsFile, row: int, block: npt.NDArray[Any]) -> None:
        with disk_errors(self._root):
            shard = self._shards.get(file.path) or self._open(file)
            shard.write(row, block)
        if shard.full:
            self._disk.submit(partial(self._seal, file, shard), shard.unsynced)
        else:
            self._sync_some()

    def _sync_some(self) -> None:
        """Have the disk take what one file has written, where that is a whole step, or all files together have too much."""
        growing = [shard for shard in self._shards.values() if not shard.full]
        largest = max(growing, key=lambda shard: shard.unsynced)
        if largest.unsynced >= _SYNC_BYTES or sum(shard.unsynced for shard in growing) >= _UNSYNCED_BYTES:
            self._disk.submit(partial(self._sync, largest, largest.take()), _SYNC_BYTES)

    def _sync(self, shard: ShardWriter, ranges: list[tuple[int, int]]) -> None:
        with disk_errors(self._root):
            shard.sync(ranges)

    def _seal(self, file: RowsFile, shard: ShardWriter) -> None:
        with disk_errors(self._root):
            self._entries[file.path] = shard.seal(slice_number=self._plan.range.number, writer=self._writer)

    def _open(self, file: RowsFile) -> ShardWriter:
        return self._shards.setdefault(file.path, ShardWriter(self._root, file))

    def _missing(self, name: str, file: RowsFile) -> list[str]:
        shard = self._shards.get(file.path)
        ranges = [(file.start, file.stop)] if shard is None else shard.missing()
        return [f"{name}: rows {start} to {stop - 1}" for start, stop in ranges]


def _joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same rows in the same order, in one range where one begins at the end of the one before."""
    joined: list[tuple[int, int]] = []
    for start, stop in ranges:
        begin = joined.pop()[0] if joined and joined[-1][1] == start else start
        joined.append((begin, stop))
    return joined


def _pieces(start: int, stop: int, most: int) -> Iterator[tuple[int, int]]:
    """Cut rows into ranges of at most `most` rows; there are none when `stop` is not above `start`."""
    for at in range(start, stop, most):
        yield at, min(at + most, stop)
