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
from pathlib import Path
from typing import TYPE_CHECKING, Self

from nnsight_hpc.storage.create import create_dataset
from nnsight_hpc.storage.documents import document_bounds, staged_file
from nnsight_hpc.storage.finish import complete_dataset
from nnsight_hpc.storage.layout import dataset_layouts
from nnsight_hpc.storage.manifest import slice_is_done
from nnsight_hpc.storage.schema import read_attributes
from nnsight_hpc.storage.shards import disk_errors
from nnsight_hpc.storage.slices import SlicePlan, SliceRange, SliceTarget, SliceWriter
from nnsight_hpc.wire.errors import Conflict, NotFound

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nnsight_hpc.storage.schema import CaptureSpec, Provenance
    from nnsight_hpc.storage.tokens import TokenTable

SHARD_BYTES = 512 << 20
QUEUE_BYTES = 256 << 20


class DatasetWriter:
    """A dataset that is being written; several processes may write different slices of it at the same time.

    Parameters
    ----------
    path
        An incomplete dataset, ``NAME.zarr`` or ``NAME.hdf5``.
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
        self._documents = document_bounds(self.path, self.attributes)
        self._queue_bytes = queue_bytes
        self._writer = writer or this_process()

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
        """Create a dataset with its tokens and documents, and open it for writing; see `create_dataset` for errors.

        It is Zarr or HDF5 as the ending of `path` says (`dataset_folder` makes it from a name and a format).
        """
        create_dataset(
            Path(path),
            captures,
            tokens,
            provenance,
            rows_per_slice=rows_per_slice,
            shard_bytes=shard_bytes,
            writer=writer or this_process(),
        )
        return cls(path, queue_bytes=queue_bytes, writer=writer)

    @property
    def slices(self) -> list[SliceRange]:
        """The plan: all slices, in the order of rows."""
        return [self._range(number) for number in range(self.attributes.slices)]

    def pending(self) -> list[SliceRange]:
        """The slices that no process has committed yet."""
        return [part for part in self.slices if not slice_is_done(self.path, part.number)]

    def is_written(self, number: int) -> bool:
        """Whether a slice is committed; in a dataset that has become complete in the meantime, all are."""
        return slice_is_done(self.path, number) or read_attributes(self.path).complete

    def slice(self, number: int) -> SliceWriter:
        """Begin a slice, as a context manager; what an earlier attempt left is removed. Raises as `plan`."""
        return SliceWriter(self.plan(number), self._writer)

    def plan(self, number: int) -> SlicePlan:
        """What there is to write of a slice.

        Raises
        ------
        NotFound
            The plan has no such slice.
        Conflict
            The slice is committed already, or the dataset has become complete.
        """
        if not 0 <= number < self.attributes.slices:
            raise NotFound(
                f"the dataset has no slice {number}", where=str(self.path), why=f"it has {self.attributes.slices}"
            )
        if self.is_written(number):
            raise Conflict(f"slice {number} is written already", where=str(self.path), next="write the pending slices")
        part = self._range(number)
        targets = {capture.name: self._target(capture, part) for capture in self.attributes.captures}
        return SlicePlan(str(self.path), part, targets, self._queue_bytes)

    def finish(self) -> None:
        """Make the dataset complete.

        Raises
        ------
        Conflict
            Slices are pending.
        """
        with disk_errors(self.path):
            complete_dataset(self.path, self._writer)

    def _range(self, number: int) -> SliceRange:
        return SliceRange(number, *self.attributes.slice_bounds(number), self._documents[number])

    def _target(self, capture: CaptureSpec, part: SliceRange) -> SliceTarget:
        array = self._captures[capture.name]
        if capture.rows == "token":
            return SliceTarget(array, part.start, part.stop, array.shard_files(part.start, part.stop))
        first, stop = part.documents
        files = [staged_file(array, part.number, part.documents)] if first < stop else []
        return SliceTarget(array, first, stop, files)


def this_process() -> str:
    """What to call this process in a manifest: its host and number."""
    return f"{socket.gethostname()}:{os.getpid()}"
