"""Documents as inputs of the model: cut, in windows, or packed, every token is one row, of one input that has it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnsight_hpc.slurm.worker.corpus import make_inputs
from nnsight_hpc.storage.corpus import Document
from nnsight_hpc.wire.errors import InvalidInput
from nnsight_hpc.wire.messages import DumpSpec

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any)
CONTEXT = st.integers(1, 20)


def inputs_of(lengths, **options):
    """Documents whose token ids count on from one to the next."""
    starts = np.cumsum([0, *lengths])
    documents = [
        Document(str(n), tokens=list(range(int(a), int(a) + length)))
        for n, (a, length) in enumerate(zip(starts, lengths, strict=False))
    ]
    return make_inputs(documents, DumpSpec(name="d", **options), None, None, lambda: False)


def parts(inputs):
    """Of each input: where it begins, its first own row, its end."""
    return list(zip(inputs.begin.tolist(), inputs.offset[:-1].tolist(), inputs.offset[1:].tolist(), strict=True))


def check_rows(inputs):
    """The inputs have all rows, each once, and the positions are those in the input."""
    position = inputs.tokens.arrays()["tokens/position"].tolist()
    assert inputs.offset[:1].tolist() == [0]
    assert len(inputs.tokens.input_ids) == inputs.offset[-1]
    for index, (begin, own, stop) in enumerate(parts(inputs)):
        assert begin <= own <= stop
        assert list(range(own - begin, stop - begin)) == position[own:stop]
        assert stop - begin == inputs.length(index) == len(inputs.ids(index))


@given(LENGTHS, CONTEXT)
def test_documents_are_cut_at_the_context(lengths, context):
    """Of each document the first tokens are one input."""
    inputs = inputs_of(lengths, context=context)
    check_rows(inputs)
    assert inputs.are_documents
    assert [min(length, context) for length in lengths] == np.diff(inputs.offset).tolist()


@given(LENGTHS, CONTEXT, st.data())
def test_windows_have_every_token_with_enough_before_it(lengths, context, data):
    """No window leaves its document or is longer than the context; all but the first have context from before."""
    stride = data.draw(st.integers(1, context))
    inputs = inputs_of(lengths, context=context, stride=stride)
    check_rows(inputs)
    assert sum(lengths) == len(inputs.tokens.input_ids)
    borders = inputs.tokens.offset.tolist()
    for begin, own, stop in (part for part in parts(inputs) if part[1] < part[2]):  # an empty document has an empty one
        document = next(n for n in range(len(lengths)) if borders[n] <= begin and stop <= borders[n + 1])
        assert stop - begin <= context
        assert begin == borders[document] == own or own - begin == context - stride


@given(LENGTHS, CONTEXT)
def test_packed_inputs_are_full(lengths, context):
    """All but the last have the length of the context, and documents keep their borders."""
    inputs = inputs_of(lengths, context=context, packed=True)
    check_rows(inputs)
    assert all(stop - begin == context for begin, _, stop in parts(inputs)[:-1])
    assert np.cumsum([0, *lengths]).tolist() == inputs.tokens.offset.tolist()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stride": 9, "context": 8}, "from 1 to the context"),
        ({"stride": -1}, "from 1 to the context"),
        ({"stride": 4, "packed": True}, "where the context ends"),
    ],
)
def test_forms_that_make_no_sense_are_refused(options, said):
    """With what is wrong."""
    with pytest.raises(InvalidInput, match=said):
        inputs_of([3], **options)


def test_texts_need_a_tokenizer():
    """Token ids do not."""
    with pytest.raises(InvalidInput, match="no tokenizer"):
        make_inputs([Document("a", text="one")], DumpSpec(name="d"), None, None, lambda: False)
