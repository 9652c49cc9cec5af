import numpy as np
import pytest
import torch

from nnsight_hpc.models import load_tokenizer, pad_left, prepare_inputs
from nnsight_hpc.wire.errors import InvalidInput

IDS = torch.tensor([[3, 4, 5]])


@pytest.fixture
def tokenizer(tiny_llama):
    return load_tokenizer(tiny_llama)


@pytest.mark.parametrize("given", ["the a of", ["the a of"]])
def test_text_is_tokenised(tokenizer, given):
    """A string and a list of one string are the same prompt."""
    assert torch.equal(prepare_inputs(given, tokenizer)["input_ids"], IDS)


@pytest.mark.parametrize(
    "given",
    [
        [3, 4, 5],
        [[3, 4, 5]],
        IDS,
        IDS[0],
        {"input_ids": IDS},
        {"input_ids": IDS[0]},
        IDS.numpy(),
        IDS[0].numpy(),
        [IDS[0].numpy()],
        list(np.array([3, 4, 5])),
    ],
)
def test_token_ids_in_every_form(given):
    """Lists, nested lists, tensors and arrays of one and two dimensions, and mappings are the same prompt."""
    got = prepare_inputs(given)
    assert torch.equal(got["input_ids"], IDS)
    assert torch.equal(got["attention_mask"], torch.ones_like(IDS))
    assert torch.equal(got["position_ids"], torch.tensor([[0, 1, 2]]))


def test_unequal_lengths_are_padded_on_the_left(tokenizer):
    """The shorter prompt gets padding before it, a mask of zeros there, and positions that begin at its first token."""
    got = prepare_inputs(["one", "the a of"], tokenizer)
    assert got["input_ids"].tolist() == [[2, 2, 14], [3, 4, 5]]
    assert got["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]
    assert got["position_ids"].tolist() == [[0, 0, 0], [0, 1, 2]]


@pytest.mark.parametrize("given", [[], "", [""], [[]], 7, None, [["a"]], [[1.5, "x"]]])
def test_what_is_no_prompt_is_refused(tokenizer, given):
    """Empty prompts and other types are InvalidInput."""
    with pytest.raises(InvalidInput):
        prepare_inputs(given, tokenizer)


def test_refusals_say_what_is_wrong():
    """No prompts at all, and batches where rows are expected."""
    with pytest.raises(InvalidInput, match="the list of them is empty"):
        prepare_inputs([])
    with pytest.raises(InvalidInput, match="one row of token ids"):
        prepare_inputs([IDS, IDS])


def test_text_needs_a_tokenizer():
    """Text for a model without a tokenizer is refused with what to do."""
    with pytest.raises(InvalidInput, match="no tokenizer"):
        prepare_inputs("the")


def test_tokenizer_that_was_not_told_to_pad(tokenizer):
    """What a tokenizer returns for prompts of unequal length is padded as the prompts themselves are."""
    prompts = ["one", "the a of"]
    got = prepare_inputs(tokenizer(prompts), tokenizer)
    for name, expected in prepare_inputs(prompts, tokenizer).items():
        assert torch.equal(got[name], expected)
    with pytest.raises(InvalidInput, match="not tensors"):
        prepare_inputs({"input_ids": [["a"], ["b"]]})


def test_prepared_prompts_are_padded_as_a_list_of_them_is(tokenizer):
    """Prompts prepared one by one and then padded are those prepared together; one without a mask is refused."""
    prompts = ["one", "the a of", "a of"]
    padded = pad_left([prepare_inputs(prompt, tokenizer) for prompt in prompts], tokenizer)
    for name, expected in prepare_inputs(prompts, tokenizer).items():
        assert torch.equal(torch.cat([each[name] for each in padded]), expected)
    with pytest.raises(InvalidInput, match="no mask"):
        pad_left([prepare_inputs(IDS), {"input_ids": IDS}])


@pytest.mark.parametrize("given", [IDS, {"input_ids": IDS}, {"input_ids": IDS[0], "attention_mask": IDS[0]}])
def test_what_is_prepared_is_new(given):
    """No tensor shares memory with what was given, which may be changed afterwards."""
    mine = {tensor.untyped_storage().data_ptr() for tensor in (given.values() if isinstance(given, dict) else [given])}
    assert mine.isdisjoint(tensor.untyped_storage().data_ptr() for tensor in prepare_inputs(given).values())
