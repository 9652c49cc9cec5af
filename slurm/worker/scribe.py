"""Who writes a slice of a dump, and what one process does: of each batch it writes the rows that lie in its own files.

The files of a slice are shared out among the ranks of a replica; a process alone has all of them. A slice is begun, its
batches are put in their order, then its files are sealed and published; or it is closed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from nnsight_hpc.slurm.worker.capture import Captor
from nnsight_hpc.storage.schema import fill_value, physical_dtype
from nnsight_hpc.storage.share import ShareWriter
from nnsight_hpc.storage.writer import this_process
from nnsight_hpc.wire.errors import Conflict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import torch

    from nnsight_hpc.graph import Graph
    from nnsight_hpc.slurm.worker.capture import Index, Run
    from nnsight_hpc.slurm.worker.slice_work import Piece, SliceWork
    from nnsight_hpc.storage import CaptureSpec
    from nnsight_hpc.storage.manifest import ManifestEntry


class Sealed(NamedTuple):
    """What is to be said of files that are on the disk, and finite values that their dtype could not hold, by capture."""

    entries: list[ManifestEntry]
    overflows: dict[str, int]


class Scribe(Protocol):
    """Whoever writes a slice: one process, or the ranks of a replica together."""

    def begin(self, work: SliceWork) -> None:
        """Begin the share of a slice; raises `HpcError` where its files cannot be made."""

    def seal(self) -> Sealed:
        """Wait until all is on the disk; raises `HpcError` where that cannot be, or rows are missing."""

    def publish(self) -> None:
        """Give the sealed files their names; raises `TakenOver` where another writer has begun them since."""

    def close(self) -> None:
        """Give the slice up, unless it is published."""


class Hands(NamedTuple):
    """Those who do the work of a dump: this process, or the ranks of a replica.

    Attributes
    ----------
    run
        Runs the graph with its tensors, to what it keeps.
    write
        Runs the graph with its tensors, and writes what it keeps of the next batch of the slice that `scribe` has begun.
    """

    run: Run
    write: Callable[[Graph, Mapping[str, torch.Tensor]], None]
    scribe: Scribe


class OwnScribe:
    """What this process writes: of each slice the share with its number, of so many.

    Attributes
    ----------
    wanted
        The captures of which there are files in its share; `put` wants nothing else.
    """

    def __init__(self, number: int = 0, of: int = 1) -> None:
        self._number, self._of = number, of
        self._share: ShareWriter | None = None
        self.wanted: tuple[CaptureSpec, ...] = ()

    def begin(self, work: SliceWork) -> None:
        self._work, self._batches = work, iter(work.batches)
        self._captor = Captor(work.captures)
        plan = work.plan.share(self._number, self._of)
        self.wanted = tuple(capture for capture in work.captures if plan.targets[capture.name].files)
        self._share = ShareWriter(plan, this_process())
        self._put_empty(self._share)

    def put(self, values: Mapping[str, Any]) -> None:
        """Write what was kept of the next batch, as soon as there is room for it. Raises as `ShareWriter.write`."""
        share, pieces = self._open(), next(self._batches)
        for capture in self.wanted:
            own = list(_own(share, capture, pieces))
            if own:
                rows = self._captor.stored(capture.name, values[capture.name], [index for index, _ in own])
                share.hand_over(capture.name, [at for _, at in own], rows)

    def seal(self) -> Sealed:
        return Sealed(self._open().seal(), dict(self._captor.overflows))

    def publish(self) -> None:
        self._open().publish()
        self.close()

    def close(self) -> None:
        if self._share is not None:
            self._share.close()
            self._share = None

    def _open(self) -> ShareWriter:
        if self._share is None:
            raise Conflict("no slice is open in this process")
        return self._share

    def _put_empty(self, share: ShareWriter) -> None:
        """Documents without tokens have rows without values."""
        for capture in self.wanted if self._work.empty else ():
            if capture.rows == "document":
                row = np.full((1, *capture.width_shape), fill_value(capture.dtype), physical_dtype(capture.dtype))
                for number in self._work.empty:
                    share.write(capture.name, number, row)


def _own(
    share: ShareWriter, capture: CaptureSpec, pieces: tuple[Piece, ...]
) -> Iterator[tuple[Index, tuple[int, int]]]:
    """Where in a capture's value the rows are that go into this process's files, and which rows they are there."""
    for number, piece in enumerate(pieces):
        if capture.rows == "token":
            for start, stop in share.own(capture.name, piece.start, piece.stop):
                offset = piece.first - piece.start
                yield (number, slice(start + offset, stop + offset)), (start, stop)
        elif piece.begins:
            for rows in share.own(capture.name, piece.input, piece.input + 1):
                yield (slice(number, number + 1),), rows
