"""Open a dataset: captures as arrays, documents, checksums, and batches for training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, overload

import numpy as np

from nnsight_hpc.storage.arrays import StoredArray
from nnsight_hpc.storage.checksums import FileSum, verify_files
from nnsight_hpc.storage.document_view import Document, Documents
from nnsight_hpc.storage.layout import ArrayLayout, dataset_layouts
from nnsight_hpc.storage.manifest import read_manifest
from nnsight_hpc.storage.schema import read_attributes
from nnsight_hpc.storage.selection import Selection
from nnsight_hpc.storage.sources import open_source
from nnsight_hpc.storage.tokens import TokenTable
from nnsight_hpc.wire.errors import Conflict, InvalidInput, NotFound

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import numpy.typing as npt
    import xarray

    from nnsight_hpc.storage.arrays import Rows
    from nnsight_hpc.storage.schema import CaptureSpec, Provenance
    from nnsight_hpc.storage.selection import Condition
    from nnsight_hpc.storage.sources import Source
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

    def arrays(self) -> dict[str, StoredArray]:
        return {"input_ids": self.input_ids, "document": self.document, "position": self.position}


class ActivationDataset:
    """An activation dataset, for reading.

    One on a cluster is read without a copy: what is asked for comes through one connection, which `close`, or the end of
    a ``with`` block, ends. A lost connection is made anew, for ten minutes.

    Parameters
    ----------
    path
        The folder ``NAME.zarr``; or ``CLUSTER:NAME``, a complete dataset on a cluster (a profile, or ``local``); or a
        `Source` that somebody has opened.
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

    def __init__(self, path: str | Path | Source, *, allow_incomplete: bool = False) -> None:
        self._source = open_source(path)
        self.path = Path(self._source.name)
        self.attributes = read_attributes(self._source.root)
        if not (self.attributes.complete or allow_incomplete):
            raise Conflict(
                "the dataset is not complete",
                where=str(self.path),
                next="wait until it is written, resume it, or open it with allow_incomplete=True",
            )
        self.present = self._present()
        arrays = {layout.path: self._array(layout) for layout in dataset_layouts(self._source.root, self.attributes)}
        self.tokens = Tokens(arrays["tokens/input_ids"], arrays["tokens/document"], arrays["tokens/position"])
        self._captures = {name: arrays[f"activations/{name}"] for name in self.captures}
        self._documents = Documents(self, arrays["documents/offset"], arrays["documents/id"])

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

    @overload
    def __getitem__(self, key: str) -> StoredArray: ...
    @overload
    def __getitem__(self, key: Rows) -> dict[str, npt.NDArray[Any]]: ...
    def __getitem__(self, key: str | Rows) -> StoredArray | dict[str, npt.NDArray[Any]]:
        """A capture by its name; or, for rows, what `rows` gives."""
        if not isinstance(key, str):
            return self.rows(key)
        if key not in self._captures:
            raise UnknownCapture(f"the dataset has no capture {key!r}", why=f"it has {', '.join(self._captures)}")
        return self._captures[key]

    def rows(self, rows: Rows, captures: Sequence[str] | None = None) -> dict[str, npt.NDArray[Any]]:
        """Rows of several captures (when None: of all that have a row a token) by name.

        With ``input_ids``, ``document`` and ``position`` of these rows.
        """
        return {name: array[rows] for name, array in (self._arrays(captures) | self.tokens.arrays()).items()}

    def document(self, key: int | str) -> Document:
        """A document by its number, from 0 (negative ones count from the end), or by its id (the first of that id).

        Raises
        ------
        RowOutOfRange, UnknownDocument
            There is none.
        """
        return self._documents.named(key) if isinstance(key, str) else self._documents.numbered(key)

    def iter_documents(self) -> Iterator[Document]:
        """All documents in order; their activations are read when they are asked for."""
        return iter(self._documents)

    def token_table(
        self, tokens: tuple[int, int] | None = None, documents: tuple[int, int] | None = None
    ) -> TokenTable:
        """The tokens and documents of rows [start, stop), all when None, as a dataset of their own has them.

        `documents` are those that have these rows; the first and the last may be cut.
        """
        start, stop = tokens or (0, len(self))
        offset, ids = self._documents.table(*(documents or (0, self.documents)))
        return TokenTable(
            input_ids=self.tokens.input_ids[start:stop],
            offset=np.clip(offset, start, stop) - start,
            ids=ids,
            position=self.tokens.position[start:stop],
        )

    def verify(self) -> None:
        """Read every shard that the manifest lists and compare sizes and checksums.

        Raises
        ------
        CorruptData
            Files are missing or differ; all of them are named.
        InvalidInput
            It lies on a cluster.
        """
        if not self._source.here:
            raise InvalidInput("a dataset can be verified where it lies", where=str(self.path), next="fetch it")
        verify_files(self.path, [FileSum(entry.path, entry.bytes, entry.crc32c) for entry in read_manifest(self.path)])

    def close(self) -> None:
        """End the connection to the cluster; a dataset of this machine has none."""
        self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def to_torch(
        self,
        captures: Sequence[str] | None = None,
        batch_size: int = 4096,
        *,
        where: Condition | None = None,
        shuffle: bool = True,
        seed: int = 0,
        buffer_rows: int = BUFFER_ROWS,
        drop_last: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> TorchBatches:
        """Batches of rows for training, as a `torch.utils.data.IterableDataset`.

        Use it in ``DataLoader(ds.to_torch(...), batch_size=None, num_workers=2)``. Each batch is a dict of tensors: the
        captures ``[n, *width_shape]`` in their own dtype, and ``document`` and ``position`` ``[n]`` (int32). Every row
        that is there comes once an epoch; the last batch (of each worker, when they shuffle) is smaller.

        Parameters
        ----------
        captures
            Names of captures; when None all that have a row a token.
        where
            Only rows for which it is true: ``where=lambda tokens: tokens.position > 0`` leaves out what stands first.
            It is called here with `TokenRows` of up to 65,536 rows, until it has seen all, and gives a mask ``[n]``.
        shuffle
            Blocks of 256 rows in random order, mixed in a buffer; in order when false.
        seed
            Together with `TorchBatches.set_epoch` it fixes the order, for a given number of workers and ranks.
        buffer_rows
            Rows of the mixing buffer, shared out among the workers. Its bytes are this times the bytes of a row.
        drop_last
            Full batches only, and as many on each rank: what `DistributedDataParallel` needs.
        rank, world
            This process's place among `world` processes that train together; each gets its part of the rows.

        Raises
        ------
        InvalidInput
            A number makes no sense, or `where` gives no mask.
        UnknownCapture
            A capture is not there.
        """
        from nnsight_hpc.storage.torch_dataset import TorchBatches  # noqa: PLC0415  (torch is loaded here, on purpose)

        if min(batch_size, buffer_rows, world) < 1 or seed < 0 or not 0 <= rank < world:
            raise InvalidInput("batch_size, buffer_rows and world must be at least 1, seed 0, and rank less than world")
        arrays = self._arrays(captures) | {"document": self.tokens.document, "position": self.tokens.position}
        return TorchBatches(
            arrays,
            Selection.of(len(self), self.present, self.tokens.arrays(), where),
            batch_size=batch_size,
            shuffle=shuffle,
            seed=seed,
            buffer_rows=buffer_rows,
            drop_last=drop_last,
            rank=rank,
            world=world,
        )

    def to_xarray(self, captures: Sequence[str] | None = None) -> xarray.Dataset:
        """Captures (when None all that have a row a token) and tokens, lazily; see `storage.lazy`."""
        from nnsight_hpc.storage.lazy import xarray_dataset  # noqa: PLC0415  (xarray is optional)

        return xarray_dataset(self._arrays(captures), self.tokens.arrays(), self.provenance)

    def _arrays(self, captures: Sequence[str] | None) -> dict[str, StoredArray]:
        """The captures of these names; without names all that have a row a token."""
        specs = self.captures
        names = [name for name, spec in specs.items() if spec.rows == "token"] if captures is None else captures
        arrays = {name: self[name] for name in names}
        wrong = [name for name in arrays if specs[name].rows != "token"]
        if wrong:
            raise InvalidInput(
                f"{', '.join(wrong)}: a row of this capture is a document, not a token",
                where=str(self.path),
                next="index the capture itself, by the numbers of documents: dataset[name][5:10]",
            )
        return arrays

    def _array(self, layout: ArrayLayout) -> StoredArray:
        capture = self.captures.get(layout.path.removeprefix("activations/"))
        if self.complete or capture is None:
            present = [(0, layout.rows)]
        else:
            present = self.present if capture.rows == "token" else []  # these are joined when the dataset is finished
        return StoredArray(self._source.files, layout, present)

    def _present(self) -> list[tuple[int, int]]:
        """Ranges of rows [start, stop) that every capture has, in order."""
        if self.complete:
            return [(0, len(self))]
        done = {entry.slice for entry in read_manifest(self._source.root) if entry.slice is not None}
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
