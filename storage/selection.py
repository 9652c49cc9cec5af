"""Which rows of a dataset training gets: a bit a row, counted by blocks of 256 rows.

A bit a row is 1/65,536 of what it chooses at width 4,096 in bfloat16, whatever the pattern of rows is. Since the rows are
known before the first is read, batches are full, and workers and ranks get equal parts of what is left.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nnsight_hpc.storage.layout import BLOCK_ROWS
from nnsight_hpc.wire.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    import numpy.typing as npt

    from nnsight_hpc.storage.arrays import StoredArray

    Numbers = npt.NDArray[np.int64]
    Condition = Callable[["TokenRows"], npt.NDArray[Any]]

_AT_ONCE = 1 << 16  # rows for which a condition is asked; a multiple of 256
_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.int64)


@dataclass(frozen=True)
class TokenRows:
    """What is known of some rows: ids of their tokens, indices of their documents, positions there; each ``[n]``."""

    input_ids: npt.NDArray[np.int32]
    document: npt.NDArray[np.int32]
    position: npt.NDArray[np.int32]


class Selection:
    """Rows of an array of `rows` rows, by the bits ``[blocks, 32]`` of each block."""

    def __init__(self, bits: npt.NDArray[np.uint8]) -> None:
        self._bits = bits
        self._ends = np.concatenate([[0], np.cumsum(_ONES[bits].sum(axis=1))])  # chosen rows before each block's end

    @classmethod
    def of(
        cls,
        rows: int,
        present: Iterable[tuple[int, int]],
        tokens: Mapping[str, StoredArray],
        where: Condition | None = None,
    ) -> Selection:
        """The rows of `present` for which `where`, if given, is true; it reads `tokens` once, 65,536 rows at a time.

        Raises
        ------
        InvalidInput
            `where` did not give a truth value for each row.
        """
        bits = np.zeros((-(-rows // BLOCK_ROWS), BLOCK_ROWS // 8), dtype=np.uint8)
        for start, stop in cut(present, _AT_ONCE):
            chosen = np.ones(stop - start, dtype=bool)
            if where is not None:
                chosen = _truth(where, TokenRows(**{name: array[start:stop] for name, array in tokens.items()}))
            packed = np.packbits(np.concatenate([np.zeros(start % 8, dtype=bool), chosen]))
            bits.reshape(-1)[start // 8 : start // 8 + len(packed)] |= packed
        return cls(bits)

    @property
    def counts(self) -> Numbers:
        """How many rows of each block are chosen."""
        return np.diff(self._ends)

    @property
    def rows(self) -> int:
        """How many rows are chosen."""
        return int(self._ends[-1])

    def in_block(self, block: int) -> Numbers:
        """The rows that are chosen of one block, in order."""
        return np.flatnonzero(np.unpackbits(self._bits[block])) + block * BLOCK_ROWS

    def between(self, start: int, stop: int) -> Numbers:
        """The chosen rows number `start` to ``stop - 1``, counted among the chosen ones, in order."""
        first, last = np.searchsorted(self._ends[1:], [start, stop - 1], side="right").tolist()
        rows = np.concatenate([self.in_block(block) for block in range(first, last + 1)])
        return rows[start - self._ends[first] :][: stop - start]


def cut(ranges: Iterable[tuple[int, int]], size: int) -> Iterator[tuple[int, int]]:
    """Cut ranges of rows at the multiples of `size`."""
    for start, stop in ranges:
        edges = [start, *range((start // size + 1) * size, stop, size), stop]
        yield from itertools.pairwise(edges)


def _truth(where: Condition, tokens: TokenRows) -> npt.NDArray[np.bool_]:
    mask = np.asarray(where(tokens))
    if mask.dtype != np.bool_ or mask.shape != tokens.document.shape:
        raise InvalidInput(
            f"`where` must give {len(tokens.document)} truth values, one a row, not {mask.dtype} {mask.shape}",
            next="compare arrays: where=lambda tokens: tokens.position > 0",
        )
    return mask
