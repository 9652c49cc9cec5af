"""Which documents of a slice share a forward: fixed by their lengths alone, so that a repeated slice gives the same bytes."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from nnsight_hpc.wire.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy as np
    import numpy.typing as npt

SHORTEST = 0.9
"""Of the longest document of its batch: so at most a tenth of any batch is padding."""


def documents_in(offset: npt.NDArray[np.int64], start: int, stop: int) -> list[int]:
    """The documents that have rows in [start, stop); `offset` is that of `TokenTable`."""
    first = int(offset.searchsorted(start, side="right")) - 1
    last = int(offset.searchsorted(stop, side="left"))
    return [document for document in range(first, last) if offset[document] < offset[document + 1]]


def batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices of documents, batch by batch, the longest first (what does not fit into memory shows at once).

    Documents of equal length share a batch without padding as long as they fill it. What remains of each length is
    put together with others that are at least nine tenths as long. A batch has at most `batch_tokens` tokens, padding
    counted, unless it is one document.
    """
    if batch_tokens < 1:
        raise InvalidInput(f"batch_tokens is {batch_tokens}, and must be at least 1")
    longest_first = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    full: list[list[int]] = []
    rest: list[int] = []
    for length, group in groupby(longest_first, key=lambda index: lengths[index]):
        members = list(group)
        size = max(1, batch_tokens // length)
        whole = len(members) // size * size
        full += [members[at : at + size] for at in range(0, whole, size)]
        rest += members[whole:]
    return sorted([*full, *_put_together(rest, lengths, batch_tokens)], key=lambda batch: (-lengths[batch[0]], batch))


def _put_together(rest: Iterable[int], lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    made: list[list[int]] = []
    for index in rest:
        if made:
            longest = lengths[made[-1][0]]
            if (len(made[-1]) + 1) * longest <= batch_tokens and lengths[index] >= SHORTEST * longest:
                made[-1].append(index)
                continue
        made.append([index])
    return made


def padded_tokens(batch: Sequence[int], lengths: Sequence[int]) -> int:
    """Tokens of the forward of a batch, padding counted."""
    return len(batch) * lengths[batch[0]]
