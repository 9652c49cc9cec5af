"""The plan of batches: every document once, little padding, and the same again for the same lengths."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnsight_hpc.slurm.worker.plan import batches, documents_in, padded_tokens
from nnsight_hpc.wire.errors import InvalidInput

LENGTHS = st.lists(st.integers(1, 300), max_size=200)
TOKENS = st.integers(1, 1000)


@given(LENGTHS, TOKENS)
def test_every_document_is_in_one_batch(lengths, batch_tokens):
    """The batches hold each document exactly once."""
    planned = batches(lengths, batch_tokens)
    assert list(range(len(lengths))) == sorted(index for batch in planned for index in batch)


@given(LENGTHS, TOKENS)
def test_batches_are_bounded_and_hardly_padded(lengths, batch_tokens):
    """A batch of more than one document fits the bound, and at most a tenth of it is padding."""
    for batch in batches(lengths, batch_tokens):
        padded, real = padded_tokens(batch, lengths), sum(lengths[index] for index in batch)
        assert len(batch) == 1 or padded <= batch_tokens
        assert padded - real <= 0.1 * padded + 1e-9


@given(LENGTHS, TOKENS)
def test_the_longest_come_first(lengths, batch_tokens):
    """Batches come in the order of their longest document, which is the first in each."""
    planned = batches(lengths, batch_tokens)
    firsts = [lengths[batch[0]] for batch in planned]
    assert sorted(firsts, reverse=True) == firsts
    assert firsts == [max(lengths[index] for index in batch) for batch in planned]


def test_equal_lengths_share_batches_without_padding():
    """Where a length has enough documents for full batches they are not mixed with others."""
    assert batches([9, 10, 9, 10, 9, 10], 20) == [[1, 3], [5, 4], [0, 2]]


def test_a_bound_below_one_is_refused():
    """No batch can be made of less than one token."""
    with pytest.raises(InvalidInput):
        batches([1], 0)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40).filter(any), st.data())
def test_documents_of_a_range_of_rows(lengths, data):
    """The documents of a range are those with a row in it; empty documents are in none."""
    offset = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    start = data.draw(st.integers(0, int(offset[-1]) - 1))
    stop = data.draw(st.integers(start + 1, int(offset[-1])))
    expected = [d for d in range(len(lengths)) if max(offset[d], start) < min(offset[d + 1], stop)]
    assert expected == documents_in(offset, start, stop)
