"""The envoy tree: names, new names, parameters, configuration."""

import pytest
import torch

from nnsight_hpc import LanguageModel, NNsight
from nnsight_hpc.wire.errors import InvalidInput

PROMPT = "the tower is in the city of"


def test_new_names_beside_the_old(lm):
    """A name for a module wherever it is, and one for a path."""
    renamed = LanguageModel(lm.module, lm.tokenizer, rename={"mlp": "ffn", "model.layers": "blocks"})
    with renamed.trace(PROMPT):
        new = renamed.blocks[1].ffn.output.save()
        old = renamed.model.layers[1].mlp.output.save()
    assert torch.equal(new, old)
    assert renamed.get("blocks.1.ffn")._path == "model.layers.1.mlp"
    assert "blocks" in dir(renamed)
    assert "ffn" in dir(renamed.blocks[0])
    assert "ffn" not in dir(renamed)
    with pytest.raises(AttributeError, match="did you mean blocks"):
        _ = renamed.block


def test_parameters_are_values_inside_and_torch_s_own_outside(model, net, x):
    """In a block parameters can be computed with, outside they are what torch has."""
    with model.trace(x):
        norms = {name: parameter.norm().save() for name, parameter in model.named_parameters()}
        total = sum(parameter.sum() for parameter in model[0].parameters()).save()
    expected = {name: parameter.norm() for name, parameter in net.named_parameters()}
    torch.testing.assert_close(norms, expected)
    torch.testing.assert_close(total, net[0].weight.sum() + net[0].bias.sum())
    assert next(iter(model.parameters())) is net[0].weight


def test_configuration_of_modules(lm):
    """Data of a module that is no tensor can be read; a parameter has no value outside of a block."""
    assert lm.config.hidden_size == 32
    assert lm.model.layers[0].self_attn.head_dim == 8
    with pytest.raises(InvalidInput):
        _ = lm.lm_head.weight


def test_skip(model, net, x):
    """A skipped module does not run; what it would have given is set."""
    with model.trace(x):
        model[0].skip(torch.ones(3, 4))
        seen = model[0].output.save()
        out = model.output.save()
    assert torch.equal(seen, torch.ones(3, 4))
    torch.testing.assert_close(out, net[1:](torch.ones(3, 4)))


def test_a_session_is_of_one_model(model, net, x):
    """A trace of another model in a session is refused; one of an edited copy is not."""
    with model.edit() as edited:
        edited[0].output = edited[0].output * 0
    with model.session(), edited.trace(x):
        out = edited.output.save()
    torch.testing.assert_close(out, net[1:](torch.zeros(3, 4)))
    with pytest.raises(InvalidInput, match="one model"), model.session(), NNsight(net).trace(x):
        pass
