"""Which rows training gets, beside a plain mask."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnsight_hpc.storage.selection import Selection, TokenRows, cut
from nnsight_hpc.wire.errors import InvalidInput


def _tokens(rows):
    """`document` holds each row's own number, so that a condition can be any mask."""
    return {name: np.arange(rows, dtype=np.int32) for name in ("input_ids", "document", "position")}


@st.composite
def _masks(draw):
    """A pattern of rows, repeated: some longer than the 65,536 rows that are asked about at once."""
    pattern = np.array(draw(st.lists(st.booleans(), min_size=1, max_size=40)))
    return np.resize(pattern, draw(st.integers(0, 700) | st.sampled_from([65536, 70000])))


@settings(max_examples=60, deadline=None)
@given(mask=_masks(), edges=st.lists(st.integers(0, 700), max_size=6, unique=True), data=st.data())
def test_a_selection_is_a_mask_of_what_is_there(mask, edges, data):
    """Ranges and condition together choose the rows; by block, by count and as a whole."""
    edges = sorted(min(edge, len(mask)) for edge in edges)[: len(edges) // 2 * 2]
    present = [(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True) if start < stop]
    there = np.zeros(len(mask), dtype=bool)
    for start, stop in present:
        there[start:stop] = True
    selection = Selection.of(len(mask), present, _tokens(len(mask)), lambda tokens: mask[tokens.document])
    expected = np.flatnonzero(mask & there)
    blocks = range(-(-len(mask) // 256))
    assert (len(expected), [np.sum(expected // 256 == block) for block in blocks]) == (
        selection.rows,
        selection.counts.tolist(),
    )
    chosen = [selection.in_block(block) for block in blocks]
    np.testing.assert_array_equal(expected, np.concatenate([*chosen, np.empty(0, dtype=np.int64)]))
    if len(expected):
        start = data.draw(st.integers(0, len(expected) - 1))
        stop = data.draw(st.integers(start + 1, len(expected)))
        np.testing.assert_array_equal(expected[start:stop], selection.between(start, stop))


def test_without_a_condition_no_tokens_are_read():
    """What is there is chosen as a whole."""
    assert Selection.of(1000, [(0, 1000)], {}).rows == 1000
    assert Selection.of(0, [(0, 0)], {}).rows == 0


def test_a_condition_is_asked_about_bounded_parts():
    """All three arrays are given, of at most 65,536 rows at a time, which follow one another."""
    seen = []

    def where(tokens: TokenRows):
        seen.append((tokens.input_ids[0], len(tokens.position)))
        return tokens.position >= 0

    Selection.of(200_000, [(0, 200_000)], _tokens(200_000), where)
    assert seen == [(0, 65536), (65536, 65536), (131072, 65536), (196608, 3392)]


@pytest.mark.parametrize(
    "where", [lambda tokens: tokens.position, lambda tokens: True, lambda tokens: tokens.position[1:] > 0]
)
def test_a_condition_that_gives_no_mask_is_refused(where):
    """Numbers, a single truth value and a mask of another length are no masks."""
    with pytest.raises(InvalidInput, match="must give 100 truth values"):
        Selection.of(100, [(0, 100)], _tokens(100), where)


def test_ranges_are_cut_at_multiples():
    """Blocks begin where the file's blocks begin, whatever the ranges."""
    assert list(cut([(3, 25), (30, 31)], 10)) == [(3, 10), (10, 20), (20, 25), (30, 31)]
