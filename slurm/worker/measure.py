"""What a dump would write, and how long it would take: its first batch is run, and nothing is written."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from nnsight_hpc.slurm.worker.capture import Captor, row_bytes
from nnsight_hpc.slurm.worker.dump import SLICE_ROWS, prepared
from nnsight_hpc.slurm.worker.plan import batches, documents_in, padded_tokens
from nnsight_hpc.storage.create import planned_layouts
from nnsight_hpc.storage.writer import SHARD_BYTES
from nnsight_hpc.wire.files import free_bytes
from nnsight_hpc.wire.messages import CapturePlan, DumpPlan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from nnsight_hpc.models import Loaded
    from nnsight_hpc.slurm.worker.capture import Run
    from nnsight_hpc.slurm.worker.corpus import Inputs
    from nnsight_hpc.slurm.worker.dump import Prepared
    from nnsight_hpc.slurm.worker.dump_job import Job
    from nnsight_hpc.storage.layout import ArrayLayout
    from nnsight_hpc.wire.messages import DatasetFormat

_BESIDE = {"zarr": 5, "hdf5": 3}
"""Files beside the shards: in Zarr of the groups, and the manifest; in HDF5 the description, the manifest, the index."""


def measure(job: Job, loaded: Loaded, run: Run, datasets: Path, cancelled: Callable[[], bool]) -> DumpPlan:
    """Tokenise the corpus, find out what the graph keeps, and run the first batch of the plan. Raises as `dump.dump`."""
    ready = prepared(job, loaded, run, cancelled)
    spec, inputs, tokens = ready.spec, ready.inputs, ready.inputs.tokens
    layouts, slice_rows = planned_layouts(
        ready.captures, tokens, rows_per_slice=SLICE_ROWS, shard_bytes=SHARD_BYTES, store=spec.format
    )
    planned = list(_batches(inputs, slice_rows, spec.batch_tokens))
    padded = sum(padded for _, padded, _ in planned)
    first, of_first, _ = planned[0]
    seconds = _seconds(ready, first)
    return DumpPlan(
        documents=len(tokens.ids),
        tokens=len(tokens.input_ids),
        padding=1 - sum(given for *_, given in planned) / padded,
        captures=tuple(_capture_plans(ready)),
        files=_files(layouts, spec.format),
        bytes=sum(layout.total_bytes for layout in layouts),
        free=free_bytes(datasets),
        seconds=seconds * padded / of_first,
        batch_tokens=of_first,
        batch_seconds=seconds,
    )


def _batches(inputs: Inputs, slice_rows: int, batch_tokens: int) -> Iterator[tuple[list[int], int, int]]:
    """All batches of a dump in their order: the inputs, and their tokens with padding and without."""
    rows = len(inputs.tokens.input_ids)
    for start in range(0, rows, slice_rows):
        some = documents_in(inputs.offset, start, min(start + slice_rows, rows))
        lengths = [inputs.length(index) for index in some]
        for batch in batches(lengths, batch_tokens):
            yield [some[at] for at in batch], padded_tokens(batch, lengths), sum(lengths[at] for at in batch)


def _seconds(ready: Prepared, batch: list[int]) -> float:
    """How long a batch takes, once its like has been run before."""
    documents = [ready.inputs.ids(index) for index in batch]
    ready.program.on(documents)
    begun = time.monotonic()
    captor = Captor(ready.captures)
    for name, value in ready.program.on(documents).items():
        captor.stored(name, value, [(slice(None),)])
    return time.monotonic() - begun


def _capture_plans(ready: Prepared) -> Iterator[CapturePlan]:
    tokens = ready.inputs.tokens
    rows = {"token": len(tokens.input_ids), "document": len(tokens.ids)}
    for one in ready.captures:
        size = rows[one.rows] * row_bytes(one)
        yield CapturePlan(name=one.name, rows=one.rows, width_shape=one.width_shape, dtype=one.dtype, bytes=size)


def _files(layouts: list[ArrayLayout], form: DatasetFormat) -> int:
    described = len(layouts) if form == "zarr" else 0  # each array of Zarr has a file that describes it
    return sum(layout.shards for layout in layouts) + described + _BESIDE[form]
