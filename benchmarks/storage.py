"""Bytes a second to and from the disk: our Zarr and HDF5, beside a raw file and the ways in which others keep activations.

Every way (`storage_ways.py`) is given the same float16 rows, and is done when its bytes are on the disk (fsync); each is
read back in order from a cold page cache. The ways take turns, and a figure is the median of the ratios to the raw file of
the same round, in bytes a second. ``TMPDIR`` names the disk. SAELens's way needs the package ``datasets``.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from figures import Figure, main
from storage_ways import BUFFER_ROWS, WIDTH, ways

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from storage_ways import Way

OURS, PEERS = ("Zarr", "HDF5"), ("SAELens", "TransformerLens", "zarr-python")
RATIO = 0.75
"""Goal: our bytes a second against those of a raw file."""


class Measured:
    """What the ways took, by round, and what they left on the disk."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.files: dict[str, int] = {}
        self.bytes: dict[str, int] = {}

    def measure(self, name: str, way: Way, rows: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder)
            os.sync()  # what others have left in the page cache
            self._time(f"write {name}", lambda: (way.write(path, rows), _each_file(path, os.fsync)))
            files = [file for file in path.rglob("*") if file.is_file()]
            self.files[name], self.bytes[name] = len(files), sum(file.stat().st_size for file in files)
            for reader, read in way.read.items():
                _each_file(path, _forget)
                self._time(f"read {name}{reader}", lambda read=read: _check(sum(map(len, read(path))), rows))

    def ratio(self, what: str, to: str) -> float:
        """How many times the bytes a second."""
        pairs = zip(self.seconds[to], self.seconds[what], strict=True)
        return statistics.median(theirs / its for theirs, its in pairs)

    def _time(self, what: str, function: Callable[[], object]) -> None:
        begun = time.perf_counter()
        function()
        self.seconds[what].append(time.perf_counter() - begun)


def measure(quick: bool) -> Iterator[Figure]:
    rounds, buffers = (2, 2) if quick else (5, 8)
    rows, measured = buffers * BUFFER_ROWS, Measured()
    for _ in range(rounds):
        for name, way in ways().items():
            measured.measure(name, way, rows)
    size = rows * WIDTH * 2
    for kind in ("write", "read"):
        speed = size / statistics.median(measured.seconds[f"{kind} raw"])
        yield Figure(f"{kind} raw, MB/s", speed / 1e6, None, ">=", f"{size / 1e6:.0f} MB")
        for what in (what for what in measured.seconds if what.startswith(kind) and what != f"{kind} raw"):
            goal = RATIO if kind == "write" and what.removeprefix("write ") in OURS else None
            yield Figure(f"{what} / raw", measured.ratio(what, f"{kind} raw"), goal, ">=", "a raw file")
    for peer in (peer for peer in PEERS if peer in measured.files):
        yield Figure(f"write Zarr / {peer}", measured.ratio("write Zarr", f"write {peer}"), 1, ">=", peer)
        yield Figure(f"write HDF5 / {peer}", measured.ratio("write HDF5", f"write {peer}"), 1, ">=", peer)
    for name, files in measured.files.items():
        yield Figure(f"{name}: files", files, None, "<=", f"{measured.bytes[name] / size:.4f} of the raw size")


def _each_file(path: Path, function: Callable[[int], object]) -> None:
    for file in path.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                function(opened.fileno())


def _forget(file: int) -> None:
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


def _check(read: int, rows: int) -> None:
    if read != rows:
        raise SystemExit(f"{read} rows were read, not {rows}")


if __name__ == "__main__":
    main(measure, __doc__ or "")
