"""Bulk dumps: what a graph keeps of a whole corpus, captured in planned batches and written slice by slice.

The plan (rows, slices, batches) follows from the request alone. So a dump that was killed goes on with the slices that
are missing, on whatever worker, several workers may write slices of it at the same time, and the dataset is byte for byte
that of one undisturbed run on such a machine. Forward passes and writing overlap: the storage has a thread that writes.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import msgspec
import numpy as np

from nnsight_hpc.slurm.worker.capture import Captor, Program, probe
from nnsight_hpc.slurm.worker.corpus import Inputs, make_inputs
from nnsight_hpc.slurm.worker.plan import batches, documents_in, padded_tokens
from nnsight_hpc.slurm.worker.slices import Turn
from nnsight_hpc.storage import DatasetWriter, dataset_folder, read_attributes
from nnsight_hpc.storage.finish import tidy_up
from nnsight_hpc.storage.schema import fill_value, physical_dtype
from nnsight_hpc.storage.shards import TakenOver
from nnsight_hpc.wire.errors import InvalidInput, NotFound, RequestCancelled
from nnsight_hpc.wire.messages import DumpProgress, DumpSpec
from nnsight_hpc.wire.workers import SliceProgress, SlicesOpened

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence
    from pathlib import Path

    from nnsight_hpc.models import Loaded
    from nnsight_hpc.slurm.worker.allowance import Allowance
    from nnsight_hpc.slurm.worker.capture import Run
    from nnsight_hpc.slurm.worker.dump_job import Job
    from nnsight_hpc.slurm.worker.slices import Slices
    from nnsight_hpc.storage import CaptureSpec
    from nnsight_hpc.storage.slices import SliceRange, SliceWriter

SLICE_ROWS = 1 << 16
"""Tokens of a slice, rounded up to whole shards: so much work is lost when a worker is killed."""
_PROGRESS = 0.5
"""Seconds between two reports of progress (the heartbeat sends them on every second)."""
logger = logging.getLogger(__name__)

Steps: TypeAlias = "Generator[None, None, dict[str, Any]]"
"""A dump, batch by batch; what it returns is its summary."""


def dump(
    job: Job,
    loaded: Loaded,
    run: Run,
    datasets: Path,
    allowance: Allowance,
    *,
    cancelled: Callable[[], bool],
    slices: Slices,
    begins: bool = True,
) -> Steps:
    """Write, or go on writing, the dataset that `job` asks for, a batch at a step; it returns a summary.

    It writes the slices that it is given, and makes the dataset complete where it is told that all are written.

    Parameters
    ----------
    run
        Runs the graph with its tensors on the model.
    datasets
        The folder in which ``NAME.zarr`` lies; made when it is not there.
    allowance
        How large the captures of all tokens together may be.
    slices
        Says which slice is to be written next: all of them, where nobody else writes.
    begins
        Whether the dataset is made where there is none.

    Raises
    ------
    Denied
        They are larger.
    InvalidInput
        The request, the corpus or a capture cannot be used.
    Conflict
        A dataset of this name holds something else.
    NotFound
        There is none of this name, and another worker was to make it.
    RequestCancelled
        `cancelled` said so; what is written stays, incomplete.
    HpcError
        The dataset cannot be written (disk full).
    """
    ready = prepared(job, loaded, run, cancelled)
    spec, inputs, captures, captor = ready
    tokens = inputs.tokens
    size = captor.bytes(len(tokens.input_ids), len(tokens.ids))
    allowance.check(size, f"dataset {spec.name}", "all captures of all tokens")
    datasets.mkdir(parents=True, exist_ok=True)
    provenance, path = job.provenance(loaded), dataset_folder(datasets, spec.name, spec.format)
    if path.exists():
        job.check_same(path, captures, tokens, provenance)
    elif not begins:
        raise NotFound(f"dataset {spec.name} is not there any more", where=str(path))
    else:
        DatasetWriter.create(path, captures=captures, tokens=tokens, provenance=provenance, rows_per_slice=SLICE_ROWS)
    return (yield from _Dump(path, ready, slices, cancelled).run())


class Prepared(NamedTuple):
    """A dump that is ready to begin."""

    spec: DumpSpec
    inputs: Inputs
    captures: tuple[CaptureSpec, ...]
    captor: Captor


def prepared(job: Job, loaded: Loaded, run: Run, cancelled: Callable[[], bool]) -> Prepared:
    """The corpus as inputs, and what the graph keeps of them; nothing is written. Raises as `dump`."""
    config = getattr(loaded.module, "config", None)
    vocabulary = getattr(config and config.get_text_config(), "vocab_size", None)
    inputs = make_inputs(job.documents, job.spec, loaded.tokenizer, vocabulary, cancelled)
    padding = getattr(loaded.tokenizer, "pad_token_id", None) or 0
    program = Program(job.graph, job.tensors, padding, run)
    captures = probe(program, job.spec.dtype)
    _check_rows(captures, inputs, job)
    return Prepared(job.spec, inputs, captures, Captor(program, captures))


def _check_rows(captures: Sequence[CaptureSpec], inputs: Inputs, job: Job) -> None:
    """Raise `InvalidInput` where rows of documents are wanted, and the model is not given whole documents."""
    name = next((capture.name for capture in captures if capture.rows == "document"), None)
    if name is not None and not inputs.are_documents:
        raise InvalidInput(
            f"{name} has a row for each document, and the model is given parts of documents",
            where=str(job.graph.nodes[job.graph.saves[name]].source or ""),
            next="leave packed and stride out, or keep a row for each token",
        )


class _Dump:
    """What one worker writes of a dump: the slices that it is given, one after another."""

    def __init__(self, path: Path, ready: Prepared, slices: Slices, cancelled: Callable[[], bool]) -> None:
        spec, inputs, captures, captor = ready
        self._path, self._inputs, self._tokens, self._captor = path, inputs, inputs.tokens, captor
        self._captures = {capture.name: capture for capture in captures}
        self._batch_tokens, self._slices, self._cancelled = spec.batch_tokens, slices, cancelled
        self._rows = self._run_tokens = self._padded_tokens = 0
        self._slice = SliceProgress(slice=0)
        self._begun = time.monotonic()
        self._reported = float("-inf")

    def run(self) -> Steps:
        if read_attributes(self._path).complete:  # by an attempt whose outcome never arrived
            tidy_up(self._path)
        else:
            writer = DatasetWriter(self._path)
            turn = yield from self._write(writer)
            if turn is Turn.COMPLETE:
                for part in writer.pending():  # a file server may show late what others have written
                    yield from self._write_slice(part, writer)
                writer.finish()
        return self._summary()

    def _write(self, writer: DatasetWriter) -> Generator[None, None, Turn]:
        """Write slices until there are no more for this worker; why that is."""
        parts, written = writer.slices, None
        self._slices.open(lambda: self._found(writer))
        while isinstance(turn := self._slices.next(written), int) or turn is Turn.WAIT:
            if self._cancelled():  # before a slice is begun, which others may have begun, too
                raise RequestCancelled("the dump was cancelled between two slices")
            if turn is Turn.WAIT:
                written = None
                yield
            else:
                written = yield from self._write_slice(parts[turn], writer)
        return turn

    def _write_slice(self, part: SliceRange, writer: DatasetWriter) -> Generator[None, None, SliceProgress | None]:
        """Write a slice, unless it is there already; None where another worker has taken it over."""
        if writer.is_written(part.number):
            return self._whole(part)
        before = Counter(self._captor.overflows)
        self._slice = SliceProgress(slice=part.number)
        try:
            with writer.slice(part.number) as slice_writer:
                self._write_empty(part, slice_writer)
                yield from self._write_batches(part, slice_writer)
        except TakenOver as error:
            logger.warning("slice %d is not written here: %s", part.number, error.what)
            return None
        logger.info("slice %d of %d is written", part.number + 1, writer.attributes.slices)
        return msgspec.structs.replace(self._whole(part), overflows=dict(self._captor.overflows - before))

    def _write_batches(self, part: SliceRange, writer: SliceWriter) -> Iterator[None]:
        inputs = documents_in(self._inputs.offset, part.start, part.stop)
        lengths = [self._inputs.length(index) for index in inputs]
        for batch in batches(lengths, self._batch_tokens):
            self._report()
            self._padded_tokens += padded_tokens(batch, lengths)
            self._run_tokens += sum(lengths[index] for index in batch)
            self._write_batch([inputs[index] for index in batch], part, writer)
            ended = time.monotonic()
            yield
            self._begun += time.monotonic() - ended  # what it has paused is no time of its own
            if not self._slices.keeps(part.number):
                raise TakenOver("another worker has gone on with it", where=str(self._path))

    def _write_batch(self, inputs: Sequence[int], part: SliceRange, writer: SliceWriter) -> None:
        """Run the inputs together, and write of each the rows that are its own and in this slice."""
        values = self._captor.run([self._inputs.ids(index) for index in inputs])
        for row, index in enumerate(inputs):
            begin, own, stop = (int(x) for x in (self._inputs.begin[index], *self._inputs.offset[index : index + 2]))
            first, last = max(own, part.start), min(stop, part.stop)
            for name, value in values.items():
                if self._captures[name].rows == "token":
                    writer.write(name, first, value[row, first - begin : last - begin])
                elif part.start <= own:  # the document begins here
                    writer.write(name, index, value[row : row + 1])
            self._count(first, last)

    def _write_empty(self, part: SliceRange, writer: SliceWriter) -> None:
        """Documents without tokens have rows without values."""
        empty = [n for n in range(*part.documents) if self._tokens.offset[n] == self._tokens.offset[n + 1]]
        for capture in self._captures.values() if empty else ():
            if capture.rows == "document":
                row = np.full((1, *capture.width_shape), fill_value(capture.dtype), physical_dtype(capture.dtype))
                for number in empty:
                    writer.write(capture.name, number, row)

    def _count(self, start: int, stop: int) -> None:
        """Count rows of the slice that are written, and the documents that end in them."""
        self._rows += stop - start
        tokens, documents = self._slice.tokens + stop - start, self._slice.documents + self._ending(start, stop)
        self._slice = self._counted(self._slice.slice, tokens, documents)

    def _whole(self, part: SliceRange) -> SliceProgress:
        return self._counted(part.number, part.stop - part.start, self._ending(part.start, part.stop))

    def _counted(self, number: int, tokens: int, documents: int) -> SliceProgress:
        size = self._captor.bytes(tokens, documents)
        return SliceProgress(slice=number, documents=documents, tokens=tokens, bytes=size)

    def _ending(self, start: int, stop: int) -> int:
        """How many documents end in these rows; those without tokens at the very beginning do, too."""
        before, after = self._tokens.offset[1:].searchsorted([start, stop], side="right")
        return int(after - before if start else after)

    def _found(self, writer: DatasetWriter) -> SlicesOpened:
        """What is on disk."""
        pending = {part.number for part in writer.pending()}
        written = [self._whole(part) for part in writer.slices if part.number not in pending]
        rows, documents = len(self._tokens.input_ids), len(self._tokens.ids)
        return SlicesOpened(
            slices=writer.attributes.slices,
            written=tuple(one.slice for one in written),
            progress=DumpProgress(
                documents=sum(one.documents for one in written),
                documents_total=documents,
                tokens=sum(one.tokens for one in written),
                tokens_total=rows,
                bytes=sum(one.bytes for one in written),
                bytes_total=self._captor.bytes(rows, documents),
            ),
        )

    def _report(self) -> None:
        now = time.monotonic()
        if now - self._reported >= _PROGRESS:
            self._reported = now
            speed = self._rows / max(now - self._begun, _PROGRESS)
            self._slices.report(msgspec.structs.replace(self._slice, speed=speed))

    def _summary(self) -> dict[str, Any]:
        """For the request's result: sizes, the share of padding in what was run, and values that overflowed."""
        padding = 1 - self._run_tokens / self._padded_tokens if self._padded_tokens else 0.0
        overflows = {name: count for name, count in self._slices.overflows.items() if count}
        seconds = time.monotonic() - self._begun
        logger.info("%d tokens in %.1f s, %.1f %% padding", self._rows, seconds, 100 * padding)
        if overflows:
            logger.warning("values became infinite in the dump's dtype: %s", overflows)
        tokens, documents = len(self._tokens.input_ids), len(self._tokens.ids)
        return {
            "path": str(self._path),
            "documents": documents,
            "tokens": tokens,
            "bytes": self._captor.bytes(tokens, documents),
            "seconds": seconds,
            "padding": padding,
            "overflows": overflows,
        }
