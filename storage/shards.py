"""Write one file of rows: rows in any order into a partial file, then what its format wants behind them, then its name.

See "Shard files" in `docs/spec/dataset.md`. Measured, writing so costs 0.8 of the speed of a plain sequential write,
where zarr-python's own sharded writes reach 0.2.

What the disk has is not kept in memory: a dump is larger than it, new pages for all of it cost several times the CPU time of
their content, and nothing is read back, for the checksum neither (`docs/decisions/020-what-the-disk-has-is-let-go.md`).
"""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from datetime import UTC, datetime
from secrets import token_hex
from typing import TYPE_CHECKING, Any, Self

import google_crc32c
import numpy as np

from nnsight_hpc.storage.crc32c import PiecewiseChecksum
from nnsight_hpc.storage.hdf5 import create_rows_file
from nnsight_hpc.storage.manifest import ManifestEntry
from nnsight_hpc.storage.schema import FILE_MODE, fill_value
from nnsight_hpc.wire.errors import HpcError, InvalidInput, TakenOver
from nnsight_hpc.wire.files import free_bytes, sync_folder

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path
    from types import TracebackType

    import numpy.typing as npt

    from nnsight_hpc.storage.layout import RowsFile

_FULL: dict[int | None, str] = {number: os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT)}
_DROPPED = 1 << 20
"""Bytes in a row, from which on their pages are let go."""
_NO_CHUNK = 2**64 - 1  # offset and size of a chunk that the file does not hold


class ShardWriter:
    """Writes a file of rows into the dataset `root`; leaving the block unpublished removes the file.

    The partial file has a name of its own in every attempt: a writer that was thought dead and wakes up finds its file
    gone, and cannot take the place of its successor's.

    Attributes
    ----------
    unsynced
        Bytes written since `take` was called.
    """

    def __init__(self, root: Path, planned: RowsFile) -> None:
        self._planned = planned
        self._path = root / planned.path
        self._partial = self._path.with_name(f"{self._path.name}.{token_hex(4)}.partial")
        self._written = np.zeros(planned.stop - planned.start, dtype=bool)
        self._left, self.unsynced = len(self._written), 0
        self._fresh: list[tuple[int, int]] = []
        if planned.kind == "hdf5":
            create_rows_file(self._partial, planned)
        else:
            self._partial.touch(FILE_MODE, exist_ok=False)
        self._file = os.open(self._partial, os.O_RDWR | os.O_CLOEXEC)
        os.ftruncate(self._file, planned.bytes)  # a file that grows costs a third more on ext4
        self._checksum = PiecewiseChecksum()
        self._checksum.add(0, os.pread(self._file, planned.data_offset, 0))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)
        self._partial.unlink(missing_ok=True)  # published files have another name by now

    @property
    def full(self) -> bool:
        """Whether every row has been written."""
        return self._left == 0

    def write(self, row: int, block: npt.NDArray[Any]) -> None:
        """Write ``block`` ``[n, *width]`` of the physical dtype to the array's rows ``row`` to ``row + n - 1``.

        Raises
        ------
        InvalidInput
            A row lies outside of this file, or was written before.
        """
        first, last = row - self._planned.start, row - self._planned.start + len(block)
        if not 0 <= first <= last <= len(self._written):
            raise InvalidInput(f"rows {row} to {row + len(block) - 1} are not in this shard", where=str(self._path))
        if self._written[first:last].any():
            raise InvalidInput(
                f"some of the rows {row} to {row + len(block) - 1} were written before", where=str(self._path)
            )
        self._write_bytes(
            np.ascontiguousarray(block), self._planned.data_offset + first * self._planned.array.row_bytes
        )
        self._written[first:last] = True
        self._left -= last - first

    def take(self) -> list[tuple[int, int]]:
        """The ranges of bytes [start, stop) that were written since the last call, for `sync`."""
        taken, self._fresh, self.unsynced = self._fresh, [], 0
        return taken

    def sync(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Bring what is written so far to the disk, and let these ranges go; another thread may go on writing.

        Of a page that others will write to, only the part that lies in a range is whole: so it stays. So do short ranges: to
        drop each of them costs more than it brings.
        """
        os.fdatasync(self._file)
        for start, stop in _joined(ranges):
            if stop - start >= _DROPPED:
                os.posix_fadvise(self._file, start, stop - start, os.POSIX_FADV_DONTNEED)

    def missing(self) -> list[tuple[int, int]]:
        """The array's rows that have not been written, as ranges [start, stop)."""
        edges = np.flatnonzero(np.diff(self._written, prepend=True, append=True)) + self._planned.start
        return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]

    def seal(self, *, slice_number: int | None, writer: str) -> ManifestEntry:
        """Write what belongs behind the rows, compute the checksum of the whole file, and sync it to disk.

        Raises
        ------
        InvalidInput
            Rows are missing.
        """
        if not self.full:
            ranges = ", ".join(f"{start} to {stop - 1}" for start, stop in self.missing()[:10])
            raise InvalidInput("the shard cannot be finished: rows were not written", where=str(self._path), why=ranges)
        offset = self._planned.data_offset + self._planned.data_bytes
        for block in behind_rows(self._planned):
            self._write_bytes(block, offset)
            offset += block.nbytes
        os.fsync(self._file)
        return ManifestEntry(
            path=self._planned.path,
            rows=(self._planned.start, self._planned.stop),
            bytes=os.fstat(self._file).st_size,
            crc32c=f"{self._checksum.value():08x}",
            slice=slice_number,
            writer=writer,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def publish(self) -> None:
        """Give the sealed file its name.

        Raises
        ------
        TakenOver
            Another writer has begun this shard since.
        """
        try:
            self._partial.rename(self._path)
        except FileNotFoundError as error:
            raise TakenOver(
                "another writer took over this part of the dataset", where=str(self._path), next="stop this writer"
            ) from error
        sync_folder(self._path.parent)

    def _write_bytes(self, block: npt.NDArray[Any], offset: int) -> None:
        content = block.reshape(-1).view(np.uint8)
        self._checksum.add(offset, content)
        self._note(offset, offset + len(content))
        view = content.data
        while view:
            written = os.pwrite(self._file, view, offset)
            view, offset = view[written:], offset + written

    def _note(self, start: int, stop: int) -> None:
        """A range will not have been synced."""
        self.unsynced += stop - start
        if self._fresh and self._fresh[-1][1] == start:
            start = self._fresh.pop()[0]
        self._fresh.append((start, stop))


def _joined(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Ranges that follow on one another as one, in order."""
    begun, end = 0, 0
    for start, stop in sorted(ranges):
        if start > end:
            yield begun, end
            begun = start
        end = stop
    yield begun, end


def remove_partials(root: Path, planned: RowsFile) -> None:
    """Remove what earlier attempts to write a file left behind."""
    path = root / planned.path
    for partial in path.parent.glob(f"{path.name}.*.partial"):
        partial.unlink(missing_ok=True)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write into an `HpcError` that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise _disk_full(path, _FULL[error.errno]) from error
        raise HpcError("the dataset cannot be written", where=str(path), why=str(error)) from error


def _disk_full(path: Path, reason: str) -> HpcError:
    return HpcError(
        "the disk is full, or a quota is used up",
        where=str(path),
        why=f"{reason}; {free_bytes(path) / 2**20:,.0f} MiB are free",
        next="free space, then resume: the slices that are finished are kept",
    )


def behind_rows(shard: RowsFile) -> tuple[npt.NDArray[Any], ...]:
    """What stands behind the rows of a file of its kind: in a Zarr shard padding up to a whole chunk, and the index."""
    return (_padding(shard), _index(shard)) if shard.kind == "zarr" else ()


def _padding(shard: RowsFile) -> npt.NDArray[Any]:
    array = shard.array
    rows = shard.chunks * array.chunk_rows - (shard.stop - shard.start)
    return np.full((rows, *array.width_shape), fill_value(array.dtype), dtype=array.physical)


def _index(shard: RowsFile) -> npt.NDArray[np.uint8]:
    """Offset and size of each chunk, and the checksum of these."""
    size = shard.array.chunk_rows * shard.array.row_bytes
    index = np.full((shard.array.shard_rows // shard.array.chunk_rows, 2), _NO_CHUNK, dtype="<u8")
    index[: shard.chunks, 0] = np.arange(shard.chunks, dtype=np.uint64) * np.uint64(size)
    index[: shard.chunks, 1] = size
    data = index.tobytes()
    return np.frombuffer(data + google_crc32c.value(data).to_bytes(4, "little"), dtype=np.uint8)
