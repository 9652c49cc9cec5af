"""Small calls from which layouts are learnt, and what makes a call differ from a usual one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nnsight_hpc.execution.fake_model import STEPS, Call
from nnsight_hpc.parallel.forms import form_of, small

PARAMETERS = ("input_ids", "attention_mask")
IDS = torch.arange(12).view(3, 4)


@pytest.mark.parametrize(
    "call",
    [
        Call((IDS,), {}),
        Call((IDS, torch.ones_like(IDS)), {"use_cache": True, "past_key_values": object()}),
        Call((), {"input_ids": IDS, "output_attentions": False, "labels": None}),
        Call((IDS,), {"max_new_tokens": 7, "do_sample": True, "temperature": 0.5, "seed": 3}, generate=True),
    ],
)
def test_usual_calls(call):
    """Tokens, masks, caches, and the settings of a generation bring no tensors to new places."""
    assert frozenset() == form_of(call, PARAMETERS)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (Call((), {"inputs_embeds": torch.ones(1, 2, 3)}), "inputs_embeds"),
        (Call((), {"input_ids": IDS, "output_attentions": True}), "output_attentions"),
        (Call((IDS,), {"output_hidden_states": True}, generate=True), "output_hidden_states"),
        (Call((IDS,), {"inputs_embeds": torch.ones(1, 2, 3)}, generate=True), "inputs_embeds"),
    ],
)
def test_other_calls(call, name):
    """What brings other tensors is named, and calls that differ in sizes alone have one form."""
    assert {name} == {argument for argument, _ in form_of(call, PARAMETERS)}
    larger = {
        key: torch.ones(5, 6, 3) if isinstance(value, torch.Tensor) and value.ndim == 3 else value
        for key, value in call.kwargs.items()
    }
    assert form_of(call, PARAMETERS) == form_of(Call(call.args, larger, call.generate), PARAMETERS)


@given(rows=st.integers(1, 5), tokens=st.integers(2, 9), width=st.integers(1, 9))
def test_a_small_call(rows, tokens, width):
    """Prompts and tokens become as many as are asked for; other sizes, and what the values may be, stay."""
    ids = torch.randint(100, 200, (rows, tokens))
    kwargs = {"attention_mask": torch.ones_like(ids), "position_ids": torch.arange(tokens)[None].expand(rows, tokens)}
    kwargs |= {"labels": ids, "extra": torch.zeros(rows, tokens, width), "past_key_values": object(), "flag": True}
    call = small(Call((ids,), kwargs), 3, 7)
    assert (3, 7) == call.args[0].shape == call.kwargs["position_ids"].shape == call.kwargs["labels"].shape
    assert set(call.args[0].flatten().tolist()) <= set(ids.flatten().tolist())
    assert (3, 7, width) == call.kwargs["extra"].shape
    assert call.kwargs["attention_mask"].sum(1).tolist() == [6, 7, 7]
    assert "past_key_values" not in call.kwargs
    assert call.kwargs["flag"]


def test_a_small_generation():
    """A generation makes a few tokens, whatever it was to make."""
    call = small(Call((IDS,), {"max_new_tokens": 1000, "max_length": 3, "seed": 1}, generate=True), 3, 7)
    assert call.kwargs == {"max_new_tokens": STEPS, "min_new_tokens": STEPS}
    assert call.generate
