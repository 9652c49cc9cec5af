"""A slice of a dataset: what is written of each capture, how it begins, and how it is committed.

One process writes a slice by a `SliceWriter`. Several share its files out (`SlicePlan.share`), each writes its own
(`share.ShareWriter`), and one of them begins the slice before the others, and commits it after them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import msgspec

from nnsight_hpc.storage.layout import ArrayLayout, RowsFile
from nnsight_hpc.storage.manifest import ManifestEntry, remove_slice_manifest, write_slice_manifest
from nnsight_hpc.storage.shards import disk_errors, remove_partials
from nnsight_hpc.storage.share import ShareWriter

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType

    import numpy.typing as npt


class SliceRange(msgspec.Struct, frozen=True):
    """A slice of the plan: its number, its rows [start, stop), and the documents [first, stop) that begin in them."""

    number: int
    start: int
    stop: int
    documents: tuple[int, int]


class SliceTarget(msgspec.Struct, frozen=True):
    """What is written of one capture: rows [start, stop) in files; none, when no document begins in the slice."""

    array: ArrayLayout
    start: int
    stop: int
    files: list[RowsFile]


class SlicePlan(msgspec.Struct, frozen=True):
    """A slice that is to be written, or one process's share of it: all that a writer has to know, wherever it is.

    Attributes
    ----------
    root
        The dataset.
    targets
        By capture.
    queue_bytes
        Most bytes of blocks that wait for the writing thread.
    """

    root: str
    range: SliceRange
    targets: dict[str, SliceTarget]
    queue_bytes: int

    @property
    def files(self) -> list[RowsFile]:
        return [file for target in self.targets.values() for file in target.files]

    def share(self, index: int, of: int) -> SlicePlan:
        """The plan with those files alone that are the writer's with this number, of so many; the first has one if any has.

        Each file has one writer, and the same in every attempt: the largest come first, each to whoever has the fewest
        bytes by then.
        """
        given, own = [0] * of, set()
        for file in sorted(self.files, key=lambda file: file.bytes, reverse=True):
            writer = given.index(min(given))
            given[writer] += file.bytes
            if writer == index:
                own.add(file.path)
        targets = {
            name: msgspec.structs.replace(target, files=[file for file in target.files if file.path in own])
            for name, target in self.targets.items()
        }
        return msgspec.structs.replace(self, targets=targets)

    def begin(self) -> None:
        """Take the slice back, and remove what earlier attempts have left of it; before anybody opens a file of it."""
        root = Path(self.root)
        with disk_errors(root):
            remove_slice_manifest(root, self.range.number)
            for file in self.files:
                remove_partials(root, file)
                path = root / file.path
                for folder in (path.parent.parent, path.parent):
                    folder.mkdir(exist_ok=True)

    def commit(self, entries: Iterable[ManifestEntry]) -> None:
        """Commit the slice, when all its files have their names; `entries` are those of all writers, in any order."""
        by_path = {entry.path: entry for entry in entries}
        root = Path(self.root)
        with disk_errors(root):
            write_slice_manifest(root, self.range.number, [by_path[file.path] for file in self.files])


class SliceWriter:
    """Writes the rows of one slice; made by `DatasetWriter.slice`.

    The slice is committed when the block ends without an error. Otherwise its files are removed. Whoever begins it removes
    what others have begun, and its first file is made at once: so of two that write it at the same time, since one was
    taken for dead, the one that began last commits it, and the other one's `TakenOver` comes before it has changed a file.
    """

    def __init__(self, plan: SlicePlan, writer: str) -> None:
        self.range = plan.range
        self._plan, self._writer = plan, writer

    def __enter__(self) -> Self:
        self._plan.begin()
        self._share = ShareWriter(self._plan, self._writer)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                entries = self._share.seal()
                self._share.publish()
                self._plan.commit(entries)
        finally:
            self._share.close()

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
        self._share.write(capture, row, block)
