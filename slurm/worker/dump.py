"""Bulk dumps: the activations of a whole corpus, captured in planned batches and written slice by slice.

The plan (rows, slices, batches) follows from the request alone. So a dump that was killed goes on with the slices that
are missing, on whatever worker, and the dataset is byte for byte that of an undisturbed run on such a machine. Forward
passes and writing overlap: the storage has a thread that writes.
"""

from __future__ import annotations

import logging
import time
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from nnsight_hpc.graph import capture_graph, expand_points
from nnsight_hpc.slurm.worker.capture import Captor, probe
from nnsight_hpc.slurm.worker.corpus import corpus_hash, read_corpus, tokenise, tokenizer_hash
from nnsight_hpc.slurm.worker.plan import batches, documents_in, padded_tokens
from nnsight_hpc.storage import DatasetWriter, Provenance, dataset_folder, read_attributes
from nnsight_hpc.wire.errors import Conflict, InvalidInput
from nnsight_hpc.wire.frames import unpack
from nnsight_hpc.wire.messages import DumpProgress, DumpSpec, decode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from nnsight_hpc.graph import Graph
    from nnsight_hpc.models import Loaded
    from nnsight_hpc.storage import CaptureSpec, TokenTable
    from nnsight_hpc.storage.writer import SliceRange, SliceWriter

SLICE_ROWS = 1 << 16
"""Tokens of a slice, rounded up to whole shards: so much work is lost when a worker is killed."""
_PROGRESS = 0.5
"""Seconds between two reports of progress (the heartbeat sends them on every second)."""
logger = logging.getLogger(__name__)


def dump(
    frame: bytes | memoryview,
    loaded: Loaded,
    datasets: Path,
    *,
    cancelled: Callable[[], bool],
    progress: Callable[[DumpProgress], None],
) -> dict[str, Any]:
    """Write, or go on writing, the dataset that a dump request asks for, and return a summary of what was done.

    Parameters
    ----------
    frame
        `DumpSpec` as header, the corpus as block.
    datasets
        The folder in which ``NAME.zarr`` lies; made when it is not there.

    Raises
    ------
    InvalidInput
        The request, the corpus or a capture cannot be used.
    NotFound
        The model has no such module.
    Conflict
        A dataset of this name holds something else.
    RequestCancelled
        `cancelled` said so; what is written stays, incomplete.
    HpcError
        The dataset cannot be written (disk full).
    """
    header, block = unpack(frame)
    spec = decode(header, DumpSpec, what="dump request")
    if spec.format != "zarr":
        raise InvalidInput(f"datasets of format {spec.format!r} cannot be written", next="use zarr")
    tokens = tokenise(read_corpus(block), loaded.tokenizer, context=spec.context, cancelled=cancelled)
    points = expand_points(spec.captures, [name for name, _ in loaded.module.named_modules()])
    graph = capture_graph(points, loaded.identity)
    captures = probe(graph, loaded, spec.dtype)
    datasets.mkdir(parents=True, exist_ok=True)
    provenance = _provenance(spec, loaded, graph, spec.corpus_fingerprint or corpus_hash(block))
    path = dataset_folder(datasets, spec.name)
    if path.exists():
        _check_same(path, captures, tokens, provenance)
    else:
        DatasetWriter.create(path, captures=captures, tokens=tokens, provenance=provenance, rows_per_slice=SLICE_ROWS)
    captor = Captor(graph, captures, loaded, cancelled)
    return _Dump(path, tokens, captor, spec.batch_tokens, progress).run()


def _provenance(spec: DumpSpec, loaded: Loaded, graph: Graph, corpus: str) -> Provenance:
    packages = ("nnsight-hpc", "torch", "transformers", "numpy", "zarr")
    return Provenance(
        model=loaded.identity.id,
        revision=loaded.identity.revision or "",
        fingerprint=loaded.identity.fingerprint,
        tokenizer_hash=tokenizer_hash(loaded.tokenizer),
        graph=graph.to_json(),
        corpus_fingerprint=corpus,
        software={name: version(name) for name in packages},
        command=spec.command,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _check_same(path: Path, captures: Sequence[CaptureSpec], tokens: TokenTable, provenance: Provenance) -> None:
    """Raise `Conflict` unless the dataset at `path` is one that an earlier attempt at this very dump has begun."""
    there = read_attributes(path)
    same = ("model", "fingerprint", "tokenizer_hash", "graph", "corpus_fingerprint")
    differing = [name for name in same if getattr(there.provenance, name) != getattr(provenance, name)]
    differing += ["captures"] * (there.captures != tuple(captures))
    differing += ["tokens"] * (there.rows != len(tokens.input_ids))
    if differing:
        raise Conflict(
            f"dataset {path.stem} exists, and is another one",
            where=str(path),
            why=f"they differ in {', '.join(differing)}",
            next=f"choose another name, or `nnsight-hpc remove {path.stem}` first",
        )
    logger.info("going on with %s", path)


class _Dump:
    """One pass over the slices that are pending, with its counts."""

    def __init__(
        self,
        path: Path,
        tokens: TokenTable,
        captor: Captor,
        batch_tokens: int,
        progress: Callable[[DumpProgress], None],
    ) -> None:
        self._path, self._tokens, self._captor = path, tokens, captor
        self._batch_tokens, self._progress = batch_tokens, progress
        self._documents = self._rows = self._run_tokens = self._padded_tokens = 0
        self._begun = time.monotonic()
        self._reported = float("-inf")

    def run(self) -> dict[str, Any]:
        if read_attributes(self._path).complete:  # by an attempt whose outcome never arrived
            self._rows, self._documents = len(self._tokens.input_ids), len(self._tokens.ids)
        else:
            self._write_pending(DatasetWriter(self._path))
        self._report(force=True)
        return self._summary()

    def _write_pending(self, writer: DatasetWriter) -> None:
        pending = writer.pending()
        for part in writer.slices:
            if part not in pending:
                self._count(part)
        for part in pending:
            with writer.slice(part.number) as slice_writer:
                self._write_slice(part, slice_writer)
            logger.info("slice %d of %d is written", part.number + 1, len(writer.slices))
        writer.finish()

    def _write_slice(self, part: SliceRange, writer: SliceWriter) -> None:
        documents = documents_in(self._tokens.offset, part.start, part.stop)
        lengths = [int(self._tokens.offset[d + 1] - self._tokens.offset[d]) for d in documents]
        for batch in batches(lengths, self._batch_tokens):
            self._report()
            self._padded_tokens += padded_tokens(batch, lengths)
            self._run_tokens += sum(lengths[index] for index in batch)
            self._write_batch([documents[index] for index in batch], part, writer)

    def _write_batch(self, documents: Sequence[int], part: SliceRange, writer: SliceWriter) -> None:
        """Run the documents together, and write of each the rows that are in this slice."""
        bounds = [(int(self._tokens.offset[d]), int(self._tokens.offset[d + 1])) for d in documents]
        values = self._captor.run([self._tokens.input_ids[start:stop] for start, stop in bounds])
        for row, (start, stop) in enumerate(bounds):
            first, last = max(start, part.start), min(stop, part.stop)
            for name, value in values.items():
                writer.write(name, first, value[row, first - start : last - start])
            self._rows += last - first
            self._documents += stop <= part.stop

    def _count(self, part: SliceRange) -> None:
        """Count a slice that an earlier attempt has written."""
        self._rows += part.stop - part.start
        ends = self._tokens.offset[1:]
        self._documents += int(((ends > part.start) & (ends <= part.stop)).sum())

    def _report(self, *, force: bool = False) -> None:
        now = time.monotonic()
        if now - self._reported < _PROGRESS and not force:
            return
        self._reported = now
        total = len(self._tokens.input_ids)
        self._progress(
            DumpProgress(
                documents=self._documents,
                documents_total=len(self._tokens.ids),
                tokens=self._rows,
                tokens_total=total,
                bytes=self._rows * self._captor.row_bytes,
                bytes_total=total * self._captor.row_bytes,
                seconds=now - self._begun,
            )
        )

    def _summary(self) -> dict[str, Any]:
        """For the request's result: sizes, the share of padding in what was run, and values that overflowed."""
        padding = 1 - self._run_tokens / self._padded_tokens if self._padded_tokens else 0.0
        overflows = {name: count for name, count in self._captor.overflows.items() if count}
        seconds = time.monotonic() - self._begun
        logger.info("%d tokens in %.1f s, %.1f %% padding", self._rows, seconds, 100 * padding)
        if overflows:
            logger.warning("values became infinite in the dump's dtype: %s", overflows)
        return {
            "path": str(self._path),
            "documents": len(self._tokens.ids),
            "tokens": self._rows,
            "bytes": self._rows * self._captor.row_bytes,
            "seconds": seconds,
            "padding": padding,
            "overflows": overflows,
        }
