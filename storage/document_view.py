"""The documents of a dataset for a reader: which rows each has, and what it is called."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from nnsight_hpc.storage.arrays import RowOutOfRange
from nnsight_hpc.storage.tokens import decode_id
from nnsight_hpc.wire.errors import NotFound

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from nnsight_hpc.storage.arrays import StoredArray
    from nnsight_hpc.storage.reader import ActivationDataset

_AT_ONCE = 1 << 14  # documents whose offsets and ids (at most 1,024 bytes each) are held


class UnknownDocument(NotFound, KeyError):
    """An id that no document has; ``except KeyError`` catches it."""


@dataclass(frozen=True)
class Document:
    """A document of the dataset: rows ``start`` to ``stop - 1``; ``document["resid_10"]`` reads its activations."""

    index: int
    id: str
    start: int
    stop: int
    dataset: ActivationDataset = field(repr=False)

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, capture: str) -> npt.NDArray[Any]:
        """Its rows of a capture; its one row, where a row is a document."""
        array = self.dataset[capture]
        return array[self.start : self.stop] if self.dataset.captures[capture].rows == "token" else array[self.index]

    @property
    def input_ids(self) -> npt.NDArray[Any]:
        return self.dataset.tokens.input_ids[self.start : self.stop]


class Documents:
    """All documents of a dataset, by number, by id, and in order; they are looked up on disk, and not held."""

    def __init__(self, dataset: ActivationDataset, offset: StoredArray, ids: StoredArray) -> None:
        self._dataset, self._offset, self._ids = dataset, offset, ids

    def numbered(self, index: int) -> Document:
        if not -len(self._ids) <= index < len(self._ids):
            raise RowOutOfRange(
                f"there is no document {index}", where=str(self._dataset.path), why=f"it has {len(self._ids)}"
            )
        (document,) = self._between(index % len(self._ids), index % len(self._ids) + 1)
        return document

    def named(self, name: str) -> Document:
        width = self._ids.shape[1]
        padded = np.frombuffer(name.encode().ljust(width, b"\0"), dtype=np.uint8)
        for start in range(0, len(self._ids), _AT_ONCE) if len(padded) == width else ():
            found = np.flatnonzero((self._ids[start : start + _AT_ONCE] == padded).all(axis=1))
            if len(found):
                return self.numbered(start + int(found[0]))
        raise UnknownDocument(f"there is no document with the id {name!r}", where=str(self._dataset.path))

    def __iter__(self) -> Iterator[Document]:
        for start in range(0, len(self._ids), _AT_ONCE):
            yield from self._between(start, min(start + _AT_ONCE, len(self._ids)))

    def table(self, first: int, last: int) -> tuple[npt.NDArray[np.int64], list[str]]:
        """For documents ``first`` to ``last - 1``: where each begins, and the last ends (one more); and their ids."""
        return self._offset[first : last + 1], [decode_id(row) for row in self._ids[first:last]]

    def _between(self, first: int, last: int) -> Iterator[Document]:
        offset, ids = self._offset[first : last + 1].tolist(), self._ids[first:last]
        for number in range(last - first):
            start, stop = offset[number : number + 2]
            yield Document(first + number, decode_id(ids[number]), start, stop, self._dataset)
