"""Batches of rows in random order, at the cost of reading blocks.

Random single rows are 10 to 100 times slower to read than blocks. So blocks of 256 rows are read in random order into a
buffer, and each batch is drawn at random from the buffer, which is refilled as it empties. The larger the buffer, the
better the rows are mixed; every row comes exactly once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from nnsight_hpc.storage.layout import BLOCK_ROWS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy.typing as npt

    from nnsight_hpc.storage.arrays import StoredArray

    Batch = dict[str, npt.NDArray[Any]]


def cut(ranges: Sequence[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """Cut ranges of rows into blocks of at most `size` rows."""
    return [(at, min(at + size, stop)) for start, stop in ranges for at in range(start, stop, size)]


def in_order(arrays: Mapping[str, StoredArray], blocks: Sequence[tuple[int, int]]) -> Iterator[Batch]:
    """One batch a block, in order."""
    for start, stop in blocks:
        yield {name: array[start:stop] for name, array in arrays.items()}


def mixed(
    arrays: Mapping[str, StoredArray],
    blocks: Sequence[tuple[int, int]],
    batch_size: int,
    buffer_rows: int,
    random: np.random.Generator,
) -> Iterator[Batch]:
    """Batches drawn from a buffer of `buffer_rows` rows, into which `blocks` are read in the order given.

    The buffer is enlarged where it could not hold a batch and a block. The last batch may be smaller.
    """
    rows = min(max(buffer_rows, batch_size + BLOCK_ROWS), sum(stop - start for start, stop in blocks))
    buffer = {name: np.empty((rows, *array.shape[1:]), dtype=array.dtype) for name, array in arrays.items()}
    filled, waiting = 0, list(reversed(blocks))
    while filled or waiting:
        while waiting and filled + waiting[-1][1] - waiting[-1][0] <= rows:
            start, stop = waiting.pop()
            for name, array in arrays.items():
                array.read_into(start, buffer[name][filled : filled + stop - start])
            filled += stop - start
        chosen = random.choice(filled, size=min(batch_size, filled), replace=False)
        yield {name: values[chosen] for name, values in buffer.items()}
        filled -= len(chosen)
        _close_gaps(buffer, chosen, filled)


def _close_gaps(buffer: Batch, chosen: npt.NDArray[Any], filled: int) -> None:
    """Move the rows behind `filled` that were not chosen to the places before it that were."""
    holes = chosen[chosen < filled]
    behind = np.arange(filled, filled + len(chosen))
    movers = np.setdiff1d(behind, chosen, assume_unique=True)
    for values in buffer.values():
        values[holes] = values[movers]
