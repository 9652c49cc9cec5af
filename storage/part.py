"""A part of a dataset (some captures, some rows) as a whole dataset of its own, wherever its source lies.

Ids of documents and positions of tokens stay as they are; documents are numbered from 0. Checksums are those of the
copy's own files. The source has one for each whole shard: of shards that lie in the part as a whole, the rows that were
copied are compared with it, and of the others nothing can be told.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import google_crc32c
import msgspec
import numpy as np

from nnsight_hpc.storage.layout import dataset_layouts
from nnsight_hpc.storage.manifest import MANIFEST, read_manifest
from nnsight_hpc.storage.reader import ActivationDataset
from nnsight_hpc.storage.schema import PartOf, numpy_dtype, read_attributes
from nnsight_hpc.storage.shards import behind_rows
from nnsight_hpc.storage.writer import DatasetWriter
from nnsight_hpc.wire.errors import Conflict, CorruptData, InvalidInput

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from nnsight_hpc.storage.arrays import StoredArray
    from nnsight_hpc.storage.layout import ArrayLayout, RowsFile
    from nnsight_hpc.storage.schema import CaptureSpec, Provenance
    from nnsight_hpc.storage.slices import SliceRange
    from nnsight_hpc.storage.sources import Source

    Bring = Callable[[Iterable["Piece"], Callable[["Piece", npt.NDArray[Any]], None]], None]

_PIECE_BYTES = 8 << 20
_SHARD_BYTES = 64 << 20
"""Of the copy: what is copied once more after Ctrl-C is at most a shard of each capture."""
_QUEUE_BYTES = 64 << 20
_TOKEN_BYTES = 12
"""What the arrays of tokens take for each."""


class Part(NamedTuple):
    """What is chosen: captures, rows of tokens [start, stop), and the documents that have these rows."""

    captures: tuple[CaptureSpec, ...]
    tokens: tuple[int, int]
    documents: tuple[int, int]

    def rows(self, capture: CaptureSpec) -> tuple[int, int]:
        """The rows of a capture that are chosen."""
        return self.tokens if capture.rows == "token" else self.documents


class Piece(NamedTuple):
    """Rows that are copied at once: `rows` of a capture, from row `source` there to row `target` here."""

    capture: str
    source: int
    target: int
    rows: int


def choose(
    dataset: ActivationDataset, captures: Sequence[str], *, tokens: slice | None = None, documents: slice | None = None
) -> Part:
    """Choose captures (all when there are none), and rows by tokens or by documents, numbered as in Python's slices.

    Raises
    ------
    UnknownCapture
        The dataset does not have one of the captures.
    InvalidInput
        No rows are chosen, or rows are chosen twice.
    """
    for name in captures:
        dataset[name]  # raises what is wrong with it
    chosen = tuple(spec for name, spec in dataset.captures.items() if not captures or name in captures)
    if tokens is not None and documents is not None:
        raise InvalidInput("rows are chosen by tokens or by documents, not by both")
    if documents is not None:
        first, last = _range(documents, dataset.documents, "document")
        rows = dataset.document(first).start, dataset.document(last - 1).stop
        if rows[0] == rows[1]:
            raise InvalidInput(f"documents {first} to {last - 1} have no tokens", where=str(dataset.path))
        return Part(chosen, rows, (first, last))
    if tokens is not None:
        start, stop = _range(tokens, len(dataset), "token")
        ends = dataset.tokens.document[[start, stop - 1]].tolist()
        return Part(chosen, (start, stop), (ends[0], ends[1] + 1))
    return Part(chosen, (0, len(dataset)), (0, dataset.documents))


def part_of(source: Source, part: Part) -> PartOf:
    """What the provenance of the copy says."""
    manifest = google_crc32c.value((source.root / MANIFEST).read_bytes())
    name = source.name.rpartition(":")[2]
    return PartOf(dataset=name, manifest=f"{manifest:08x}", tokens=part.tokens, documents=part.documents)


def bytes_of(part: Part) -> int:
    """About how many bytes the copy has."""
    rows = sum((stop - start) * _row_bytes(one) for one in part.captures for start, stop in [part.rows(one)])
    return rows + (part.tokens[1] - part.tokens[0]) * _TOKEN_BYTES


def copy_part(source: Source, part: Part, target: Path, bring: Bring, found: Callable[[int], None]) -> None:
    """Copy a part to `target`, of the source's store; goes on with the slices that an earlier call has not finished.

    Parameters
    ----------
    bring
        Reads pieces of the source, in any order and by several threads, and hands each with its rows to its second
        argument.
    found
        Called with the bytes of each slice that is there already.

    Raises
    ------
    Conflict
        `target` holds another part.
    CorruptData
        Whole shards of the source are not what its manifest says.
    HpcError
        The disk is full.
    """
    dataset = ActivationDataset(source)
    provenance = msgspec.structs.replace(dataset.provenance, part_of=part_of(source, part))
    if not (target.exists() and read_attributes(target).complete):
        _write(_writer(dataset, part, target, provenance), part, bring, found)
    _check_whole_shards(source, part, target)


def _write(writer: DatasetWriter, part: Part, bring: Bring, found: Callable[[int], None]) -> None:
    pending = writer.pending()
    for one in writer.slices:
        pieces = list(_pieces(part, one))
        if one in pending:
            with writer.slice(one.number) as opened:
                bring(pieces, lambda piece, block: opened.write(piece.capture, piece.target, block))
        else:
            widths = {capture.name: _row_bytes(capture) for capture in part.captures}
            found(sum(piece.rows * widths[piece.capture] for piece in pieces))
    writer.finish()


def _writer(dataset: ActivationDataset, part: Part, target: Path, provenance: Provenance) -> DatasetWriter:
    if target.exists():
        if read_attributes(target).provenance != provenance:
            raise Conflict("there is another part", where=str(target), next="remove it")
        return DatasetWriter(target, queue_bytes=_QUEUE_BYTES)
    return DatasetWriter.create(
        target,
        captures=part.captures,
        tokens=dataset.token_table(part.tokens, part.documents),
        provenance=provenance,
        shard_bytes=_SHARD_BYTES,
        queue_bytes=_QUEUE_BYTES,
    )


def _pieces(part: Part, copied: SliceRange) -> Iterator[Piece]:
    for capture in part.captures:
        start, stop = (copied.start, copied.stop) if capture.rows == "token" else copied.documents
        step = max(1, _PIECE_BYTES // _row_bytes(capture))
        for row in range(start, stop, step):
            yield Piece(capture.name, part.rows(capture)[0] + row, row, min(step, stop - row))


def _row_bytes(capture: CaptureSpec) -> int:
    return int(np.prod(capture.width_shape, dtype=np.int64)) * numpy_dtype(capture.dtype).itemsize


def _range(chosen: slice, length: int, what: str) -> tuple[int, int]:
    start, stop, _ = chosen.indices(length)
    if start >= stop:
        given = ":".join("" if end is None else str(end) for end in (chosen.start, chosen.stop))
        raise InvalidInput(f"{given} are no {what}s", why=f"the dataset has {length}, numbered from 0")
    return start, stop


def _check_whole_shards(source: Source, part: Part, target: Path) -> None:
    """Compare what was copied of each whole shard of the source with the source's manifest."""
    sums = {entry.path: entry.crc32c for entry in read_manifest(source.root)}
    copy = ActivationDataset(target)
    chosen = {f"activations/{one.name}": (copy[one.name], part.rows(one)) for one in part.captures}
    chosen |= {
        "tokens/input_ids": (copy.tokens.input_ids, part.tokens),
        "tokens/position": (copy.tokens.position, part.tokens),
    }
    wrong = [
        shard.path
        for layout in dataset_layouts(source.root, read_attributes(source.root))
        if layout.path in chosen
        for shard in _whole_shards(layout, *chosen[layout.path][1])
        if _checksum(source, shard, *chosen[layout.path]) != sums.get(shard.path)
    ]
    if wrong:
        raise CorruptData(
            f"{len(wrong)} shards of the dataset are not what its manifest says",
            where=source.name,
            why="\n".join(wrong[:20]),
            next="they are damaged on the cluster, or were on the way: verify the dataset there, then fetch again",
        )


def _whole_shards(layout: ArrayLayout, start: int, stop: int) -> Iterator[RowsFile]:
    for shard in layout.shard_files(start, stop):
        if start <= shard.start and shard.stop <= stop:
            yield shard


def _checksum(source: Source, shard: RowsFile, copy: StoredArray, chosen: tuple[int, int]) -> str:
    """The crc32c that the source's file has, if its rows are those of the copy."""
    header = bytearray(shard.data_offset)
    if header:
        source.files.read_into(shard.path, 0, memoryview(header))
    checksum = google_crc32c.value(bytes(header))
    step = max(1, _PIECE_BYTES // shard.array.row_bytes)
    for row in range(shard.start, shard.stop, step):
        block = copy[row - chosen[0] : min(row + step, shard.stop) - chosen[0]]
        checksum = google_crc32c.extend(checksum, block.reshape(-1).view(np.uint8))
    for block in behind_rows(shard):
        checksum = google_crc32c.extend(checksum, block.reshape(-1).view(np.uint8))
    return f"{checksum:08x}"
