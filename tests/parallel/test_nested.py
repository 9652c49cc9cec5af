"""Names of the leaves of nested values."""

from __future__ import annotations

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from nnsight_hpc.parallel.nested import mapped, named_leaves, parameters_of


class Attention(nn.Module):
    def forward(self, hidden_states, position_embeddings=None, *rest, mask=None, **kwargs):
        return hidden_states


def names(tree, arguments=None):
    return [name for name, _ in named_leaves(tree, arguments)[0]]


def test_arguments_have_one_name_by_position_and_by_keyword():
    """An argument is called as the forward's parameter, however it is given; others by number and keyword."""
    module = Attention()
    module.forward = lambda *args: args[0]  # as tensor parallelism does
    parameters = parameters_of(module)
    assert parameters == ("hidden_states", "position_embeddings")
    assert names(((1, (2, 3)), {}), parameters) == ["hidden_states", "position_embeddings[0]", "position_embeddings[1]"]
    assert names(((), {"hidden_states": 1, "position_embeddings": [2]}), parameters) == [
        "hidden_states",
        "position_embeddings[0]",
    ]
    assert names(((1, 2, 3), {"mask": 4}), parameters) == ["hidden_states", "position_embeddings", "2", "mask"]


def test_outputs():
    """A tensor alone has no name; entries of a model's output have that of the field."""
    output = CausalLMOutputWithPast(logits=torch.ones(2), hidden_states=(torch.ones(1), torch.zeros(1)))
    assert names(torch.ones(1)) == [""]
    assert names(output) == ["['logits']", "['hidden_states'][0]", "['hidden_states'][1]"]
    doubled = mapped(output, lambda name, leaf: leaf * 2 if "logits" in name else leaf)
    assert type(doubled) is CausalLMOutputWithPast
    assert doubled.logits.tolist() == [2.0, 2.0]
    assert doubled.hidden_states[0] is output.hidden_states[0]
