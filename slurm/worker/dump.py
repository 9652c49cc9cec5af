"""Bulk dumps: what a graph keeps of a whole corpus, captured in planned batches and written slice by slice.

The plan (rows, slices, batches) follows from the request alone. So a dump that was killed goes on with the slices that
are missing, on whatever worker, several workers may write slices of it at the same time, and the dataset is byte for byte
that of one undisturbed run on such a machine. Forward passes and writing overlap: the storage has a thread that writes. Of a
replica with several ranks each writes some of the files (`scribes`).
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import msgspec

from nnsight_hpc.slurm.worker.capture import Program, bytes_of, probe
from nnsight_hpc.slurm.worker.corpus import Inputs, make_inputs
from nnsight_hpc.slurm.worker.plan import padded_tokens
from nnsight_hpc.slurm.worker.slice_work import slice_work
from nnsight_hpc.slurm.worker.slices import Turn
from nnsight_hpc.storage import DatasetWriter, dataset_folder, read_attributes
from nnsight_hpc.storage.finish import tidy_up
from nnsight_hpc.wire.errors import InvalidInput, NotFound, RequestCancelled, TakenOver
from nnsight_hpc.wire.messages import DumpProgress, DumpSpec
from nnsight_hpc.wire.workers import SliceProgress, SlicesOpened

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence
    from pathlib import Path

    from nnsight_hpc.models import Loaded
    from nnsight_hpc.slurm.worker.allowance import Allowance
    from nnsight_hpc.slurm.worker.capture import Run
    from nnsight_hpc.slurm.worker.dump_job import Job
    from nnsight_hpc.slurm.worker.scribe import Hands, Sealed
    from nnsight_hpc.slurm.worker.slice_work import SliceWork
    from nnsight_hpc.slurm.worker.slices import Slices
    from nnsight_hpc.storage import CaptureSpec
    from nnsight_hpc.storage.slices import SliceRange

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
    hands: Hands,
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
    ready = prepared(job, loaded, hands.run, cancelled)
    spec, inputs, captures, _ = ready
    tokens = inputs.tokens
    size = bytes_of(captures, len(tokens.input_ids), len(tokens.ids))
    allowance.check(size, f"dataset {spec.name}", "all captures of all tokens")
    datasets.mkdir(parents=True, exist_ok=True)
    provenance, path = job.provenance(loaded), dataset_folder(datasets, spec.name, spec.format)
    if path.exists():
        job.check_same(path, captures, tokens, provenance)
    elif not begins:
        raise NotFound(f"dataset {spec.name} is not there any more", where=str(path))
    else:
        DatasetWriter.create(path, captures=captures, tokens=tokens, provenance=provenance, rows_per_slice=SLICE_ROWS)
    return (yield from _Dump(path, ready, hands, slices, cancelled).run())


class Prepared(NamedTuple):
    """A dump that is ready to begin."""

    spec: DumpSpec
    inputs: Inputs
    captures: tuple[CaptureSpec, ...]
    program: Program


def prepared(job: Job, loaded: Loaded, run: Run, cancelled: Callable[[], bool]) -> Prepared:
    """The corpus as inputs, and what the graph keeps of them; nothing is written. Raises as `dump`."""
    config = getattr(loaded.module, "config", None)
    vocabulary = getattr(config and config.get_text_config(), "vocab_size", None)
    inputs = make_inputs(job.documents, job.spec, loaded.tokenizer, vocabulary, cancelled)
    padding = getattr(loaded.tokenizer, "pad_token_id", None) or 0
    program = Program(job.graph, job.tensors, padding, run)
    captures = probe(program, job.spec.dtype)
    _check_rows(captures, inputs, job)
    return Prepared(job.spec, inputs, captures, program)


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

    def __init__(
        self, path: Path, ready: Prepared, hands: Hands, slices: Slices, cancelled: Callable[[], bool]
    ) -> None:
        spec, self._inputs, self._captures, self._program = ready
        self._path, self._tokens, self._hands = path, self._inputs.tokens, hands
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
        self._slice = SliceProgress(slice=part.number)
        run, padded = self._run_tokens, self._padded_tokens
        work = slice_work(writer.plan(part.number), self._inputs, self._captures, self._batch_tokens)
        try:
            sealed = yield from self._commit(work)
        except TakenOver as error:
            logger.warning("slice %d is not written here: %s", part.number, error.what)
            return None
        logger.info("slice %d of %d is written", part.number + 1, writer.attributes.slices)
        return msgspec.structs.replace(
            self._whole(part),
            overflows=sealed.overflows,
            run_tokens=self._run_tokens - run,
            padded_tokens=self._padded_tokens - padded,
        )

    def _commit(self, work: SliceWork) -> Generator[None, None, Sealed]:
        """Have a slice written and commit it, or leave nothing of it."""
        scribe = self._hands.scribe
        work.plan.begin()
        try:
            scribe.begin(work)
            yield from self._write_batches(work)
            sealed = scribe.seal()
            scribe.publish()
        except BaseException:
            scribe.close()
            raise
        work.plan.commit(sealed.entries)
        return sealed

    def _write_batches(self, work: SliceWork) -> Iterator[None]:
        for pieces in work.batches:
            self._report()
            documents = [self._inputs.ids(piece.input) for piece in pieces]
            lengths = [*map(len, documents)]
            self._padded_tokens += padded_tokens(range(len(documents)), lengths)
            self._run_tokens += sum(lengths)
            self._hands.write(self._program.graph, self._program.tensors_for(documents))
            for piece in pieces:
                self._count(piece.start, piece.stop)
            ended = time.monotonic()
            yield
            self._begun += time.monotonic() - ended  # what it has paused is no time of its own
            if not self._slices.keeps(work.plan.range.number):
                raise TakenOver("another worker has gone on with it", where=str(self._path))

    def _count(self, start: int, stop: int) -> None:
        """Count rows of the slice that are written, and the documents that end in them."""
        self._rows += stop - start
        tokens, documents = self._slice.tokens + stop - start, self._slice.documents + self._ending(start, stop)
        self._slice = self._counted(self._slice.slice, tokens, documents)

    def _whole(self, part: SliceRange) -> SliceProgress:
        return self._counted(part.number, part.stop - part.start, self._ending(part.start, part.stop))

    def _counted(self, number: int, tokens: int, documents: int) -> SliceProgress:
        size = bytes_of(self._captures, tokens, documents)
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
                bytes_total=bytes_of(self._captures, rows, documents),
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
        padding = self._slices.padding
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
            "bytes": bytes_of(self._captures, tokens, documents),
            "seconds": seconds,
            "padding": padding,
            "overflows": overflows,
        }
