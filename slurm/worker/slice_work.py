"""What there is to do for a slice of a dump: its forwards, and which rows are written of their inputs.

It follows from the plan alone, so that a repeated slice gives the same bytes. All who write a slice have it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from nnsight_hpc.slurm.worker.plan import batches, documents_in
from nnsight_hpc.storage.schema import CaptureSpec
from nnsight_hpc.storage.slices import SlicePlan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nnsight_hpc.slurm.worker.corpus import Inputs
    from nnsight_hpc.storage.slices import SliceRange


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """What is written of one input of a forward.

    Attributes
    ----------
    input
        Its number. Where captures have rows of documents, inputs are documents.
    first
        The first of its tokens that is written.
    start, stop
        The rows of these tokens in the dataset: [start, stop).
    begins
        Whether it begins in the slice, which has its row then, where it is a document.
    """

    input: int
    first: int
    start: int
    stop: int
    begins: bool


class SliceWork(msgspec.Struct, frozen=True):
    """A slice that is to be written.

    Attributes
    ----------
    empty
        The documents without tokens that begin in it.
    batches
        The forwards, in their order.
    """

    plan: SlicePlan
    captures: tuple[CaptureSpec, ...]
    empty: tuple[int, ...]
    batches: tuple[tuple[Piece, ...], ...]


def slice_work(plan: SlicePlan, inputs: Inputs, captures: Sequence[CaptureSpec], batch_tokens: int) -> SliceWork:
    """The work of a slice; its batches have at most `batch_tokens` tokens, as `plan.batches` says."""
    part, offset = plan.range, inputs.tokens.offset
    some = documents_in(inputs.offset, part.start, part.stop)
    lengths = [inputs.length(index) for index in some]
    return SliceWork(
        plan,
        tuple(captures),
        empty=tuple(n for n in range(*part.documents) if offset[n] == offset[n + 1]),
        batches=tuple(
            tuple(_piece(some[at], inputs, part) for at in batch) for batch in batches(lengths, batch_tokens)
        ),
    )


def _piece(index: int, inputs: Inputs, part: SliceRange) -> Piece:
    """Of an input the rows that are its own, and in the slice."""
    begin, own, stop = (int(x) for x in (inputs.begin[index], *inputs.offset[index : index + 2]))
    first, last = max(own, part.start), min(stop, part.stop)
    return Piece(index, first - begin, first, last, begins=part.start <= own)
