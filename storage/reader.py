"""Open a dataset: captures as arrays, documents, checksums, and batches for training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnsight_hpc.storage.arrays import RowOutOfRange, StoredArray
from nnsight_hpc.storage.checksums import FileSum, verify_files
from nnsight_hpc.storage.layout import ArrayLayout, dataset_layouts
from nnsight_hpc.storage.manifest import read_manifest
from nnsight_hpc.storage.schema import read_attributes
from nnsight_hpc.storage.tokens import decode_id
from nnsight_hpc.wire.errors import Conflict, InvalidInput, NotFound

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy.typing as npt

    from nnsight_hpc.storage.schema import CaptureSpec, Provenance
    from nnsight_hpc.storage.torch_dataset import TorchBatches

BUFFER_ROWS = 32768


class UnknownCapture(NotFound, KeyError):
    """A capture that the dataset does not have; ``except KeyError`` catches it."""


@dataclass(frozen=True)
class Tokens:
    """The arrays ``[tokens]`` of token ids, of the index of each token's document, and of its position."""

    input_ids: StoredArray
    document: StoredArray
    position: StoredArray


@dataclass(frozen=True)
class Document:
    """A document of the dataset: rows ``start`` to ``stop - 1``; ``document["resid_10"]`` reads its activations."""

    index: int
    id: str
    start: int
    stop: int
    dataset: ActivationDataset

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, capture: str) -> npt.NDArray[Any]:
        return self.dataset[capture][self.start : self.stop]

    @property
    def input_ids(self) -> npt.NDArray[Any]:
        return self.dataset.tokens.input_ids[self.start : self.stop]


class ActivationDataset:
    """An activation dataset on disk, for reading.

    Parameters
    ----------
    path
        The folder ``NAME.zarr``.
    allow_incomplete
        Open a dataset that is still being written; rows that are not in `present` raise `NotFound`.

    Raises
    ------
    NotFound
        There is no dataset at `path`.
    Conflict
        It is incomplete, and `allow_incomplete` is false.
    Incompatible, CorruptData
        Its metadata cannot be used; see `read_attributes` and `dataset_layouts`.
    """

    def __init__(self, path: str | Path, *, allow_incomplete: bool = False) -> None:
        self.path = Path(path)
        self.attributes = read_attributes(self.path)
        if not (self.attributes.complete or allow_incomplete):
            raise Conflict(
                "the dataset is not complete",
                where=str(self.path),
                next="wait until it is written, resume it, or open it with allow_incomplete=True",
            )
        self.present = self._present()
        arrays = {layout.path: self._array(layout) for layout in dataset_layouts(self.path, self.attributes)}
        self.tokens = Tokens(arrays["tokens/input_ids"], arrays["tokens/document"], arrays["tokens/position"])
        self._offset, self._ids = arrays["documents/offset"], arrays["documents/id"]
        self._captures = {name: arrays[f"activations/{name}"] for name in self.captures}

    @property
    def captures(self) -> dict[str, CaptureSpec]:
        """The captures by name, in the order in which they were asked for."""
        return {capture.name: capture for capture in self.attributes.captures}

    @property
    def provenance(self) -> Provenance:
        return self.attributes.provenance

    @property
    def complete(self) -> bool:
        return self.attributes.complete

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return self.attributes.documents

    def __len__(self) -> int:
        """How many tokens there are: the rows of each capture."""
        return self.attributes.rows

    def __repr__(self) -> str:
        return f"<ActivationDataset {self.path} {len(self)} tokens, {self.documents} documents: {', '.join(self.captures)}>"

    def __getitem__(self, capture: str) -> StoredArray:
        if capture not in self._captures:
            raise UnknownCapture(f"the dataset has no capture {capture!r}", why=f"it has {', '.join(self._captures)}")
        return self._captures[capture]

    def document(self, index: int) -> Document:
        """Document number `index`, from 0; negative numbers count from the end."""
        if not -self.documents <= index < self.documents:
            raise RowOutOfRange(f"there is no document {index}", where=str(self.path), why=f"it has {self.documents}")
        index %= self.documents
        start, stop = self._offset[index : index + 2].tolist()
        return Document(index, decode_id(self._ids[index]), start, stop, self)

    def verify(self) -> None:
        """Read every shard that the manifest lists and compare sizes and checksums.

        Raises
        ------
        CorruptData
            Files are missing or differ; all of them are named.
        """
        verify_files(self.path, [FileSum(entry.path, entry.bytes, entry.crc32c) for entry in read_manifest(self.path)])

    def to_torch(
        self,
        captures: Sequence[str] | None = None,
        batch_size: int = 4096,
        *,
        shuffle: bool = True,
        seed: int = 0,
        buffer_rows: int = BUFFER_ROWS,
    ) -> TorchBatches:
        """Batches of rows for training, as a `torch.utils.data.IterableDataset`.

        Use it in ``DataLoader(ds.to_torch(...), batch_size=None, num_workers=2)``. Each batch is a dict of tensors: the
        captures ``[n, *width_shape]`` in their own dtype, and ``document`` and ``position`` ``[n]`` (int32). Every row
        that is there comes once an epoch; the last batches are smaller.

        Parameters
        ----------
        captures
            Names of captures; all when None.
        shuffle
            Blocks of 256 rows in random order, mixed in a buffer; in order when false.
        seed
            Together with `TorchBatches.set_epoch` it fixes the order, for a given number of workers.
        buffer_rows
            Rows of the mixing buffer, shared out among the workers. Its bytes are this times the bytes of a row.
        """
        from nnsight_hpc.storage.torch_dataset import TorchBatches  # noqa: PLC0415  (torch is loaded here, on purpose)

        if batch_size < 1 or buffer_rows < 1:
            raise InvalidInput("batch_size and buffer_rows must be at least 1")
        arrays = {name: self[name] for name in (self.captures if captures is None else captures)}
        arrays |= {"document": self.tokens.document, "position": self.tokens.position}
        return TorchBatches(
            arrays, self.present, batch_size=batch_size, shuffle=shuffle, seed=seed, buffer_rows=buffer_rows
        )

    def _array(self, layout: ArrayLayout) -> StoredArray:
        present = self.present if layout.path.startswith("activations/") else [(0, layout.rows)]
        return StoredArray(self.path, layout, present)

    def _present(self) -> list[tuple[int, int]]:
        """Ranges of rows [start, stop) that every capture has, in order."""
        if self.complete:
            return [(0, len(self))]
        done = {entry.slice for entry in read_manifest(self.path) if entry.slice is not None}
        return _joined(self.attributes.slice_bounds(number) for number in sorted(done))


def _joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighbouring ranges made one."""
    joined: list[tuple[int, int]] = []
    for start, stop in ranges:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined
