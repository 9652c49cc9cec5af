"""Batches of chosen rows, in order or mixed at the cost of reading blocks.

Random single rows are 10 to 100 times slower to read than blocks. So blocks of 256 rows are read in random order into a
buffer, and each batch is drawn at random from the buffer, which is refilled as it empties. The larger the buffer, the
better the rows are mixed; every row comes exactly once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from nnsight_hpc.storage.layout import BLOCK_ROWS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    import numpy.typing as npt

    from nnsight_hpc.storage.arrays import StoredArray
    from nnsight_hpc.storage.selection import Selection

    Batch = dict[str, npt.NDArray[Any]]


def in_order(
    arrays: Mapping[str, StoredArray], selection: Selection, batches: Iterable[int], batch_size: int
) -> Iterator[Batch]:
    """The batches of these numbers, each the next `batch_size` of the chosen rows."""
    for number in batches:
        rows = selection.between(number * batch_size, min((number + 1) * batch_size, selection.rows))
        yield {name: _take(array, rows) for name, array in arrays.items()}


def mixed(
    arrays: Mapping[str, StoredArray],
    selection: Selection,
    blocks: npt.NDArray[np.int64],
    *,
    batch_size: int,
    buffer_rows: int,
    random: np.random.Generator,
) -> Iterator[Batch]:
    """Batches drawn from a buffer of `buffer_rows` rows, into which the chosen rows of `blocks` are read in the order given.

    The buffer is enlarged where it could not hold a batch and a block. The last batch may be smaller.
    """
    rows = min(max(buffer_rows, batch_size + BLOCK_ROWS), len(blocks) * BLOCK_ROWS)
    buffer = {name: np.empty((rows, *array.shape[1:]), dtype=array.dtype) for name, array in arrays.items()}
    places, filled, read = np.arange(rows), 0, 0  # the first `filled` places of the buffer hold rows
    while True:
        while read < len(blocks) and filled + BLOCK_ROWS <= rows:
            chosen = selection.in_block(blocks[read])
            for name, array in arrays.items():
                buffer[name][places[filled : filled + len(chosen)]] = _take(array, chosen)
            filled, read = filled + len(chosen), read + 1
        if not filled:
            return
        drawn = _draw(places, filled, min(batch_size, filled), random)
        filled -= len(drawn)
        yield {name: values[drawn] for name, values in buffer.items()}


def _draw(places: npt.NDArray[np.int64], filled: int, count: int, random: np.random.Generator) -> npt.NDArray[np.int64]:
    """`count` of the first `filled` places at random, which are moved behind the others."""
    drawn = random.choice(filled, size=count, replace=False)
    chosen, left = places[drawn], filled - count
    places[drawn[drawn < left]] = places[np.setdiff1d(np.arange(left, filled), drawn, assume_unique=True)]
    places[left:filled] = chosen
    return chosen


def _take(array: StoredArray, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """Ascending `rows`; read at once, without a copy, where there are no gaps between them."""
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1:
        return array[int(rows[0]) : int(rows[-1]) + 1]
    return array[rows]
