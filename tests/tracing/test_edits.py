"""Edits: interventions that stay, on a copy or on the model itself."""

import pytest
import torch
from torch import nn

from nnsight_hpc import NNsight
from nnsight_hpc.wire.errors import InvalidInput

PROMPT = "the tower is in the city of"


def _out(model, x):
    with model.trace(x):
        found = {"out": model.output.save()}
    return found["out"]


def test_copy_is_edited_and_the_model_is_not(model, net, x):
    """Every trace of the edited model begins with the edit; the module is shared and stays as it is."""
    shift = torch.ones(4)
    with model.edit() as edited:
        edited[0].output[:] = edited[0].output + shift
    shift.zero_()
    torch.testing.assert_close(_out(edited, x), net[1:](net[0](x) + 1))
    torch.testing.assert_close(_out(model, x), net(x))
    assert edited.module is model.module


def test_in_place_until_it_is_cleared(model, net, x):
    """An edit in place is the model's own, until `clear_edits`."""
    with model.edit(inplace=True) as edited:
        model[1].output = model[1].output * 0
    assert edited is model
    torch.testing.assert_close(_out(model, x), net[2](torch.zeros(3, 4)))
    model.clear_edits()
    torch.testing.assert_close(_out(model, x), net(x))


def test_edits_add_up_and_a_trace_sees_them(model, net, x):
    """An edit of an edited model comes after the first; a trace's own changes come last."""
    with model.edit() as once:
        once[0].output = once[0].output + 1
    with once.edit() as twice:
        twice[0].output = twice[0].output * 2
    with twice.trace(x):
        seen = twice[0].output.save()
        twice[0].output = twice[0].output * 0
        out = twice.output.save()
    torch.testing.assert_close(seen, (net[0](x) + 1) * 2)
    torch.testing.assert_close(out, net[1:](torch.zeros(3, 4)))
    torch.testing.assert_close(_out(once, x), net[1:](net[0](x) + 1))


def test_edit_holds_in_invokes_and_at_every_step(lm):
    """An edit acts on all rows of every forward, and at every step of a generation."""
    with lm.edit() as edited:
        edited.lm_head.output = torch.roll(edited.lm_head.output, 1, dims=-1)
    handle = lm.module.lm_head.register_forward_hook(lambda _m, _i, out: torch.roll(out, 1, dims=-1))
    expected = lm.module.generate(**lm.tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=4, do_sample=False)
    handle.remove()
    with edited.generate(PROMPT, max_new_tokens=4) as tracer:
        tokens = tracer.result.save()
    assert torch.equal(tokens, expected)
    with edited.trace() as tracer:
        for prompt in ("one two", "three four", PROMPT):
            with tracer.invoke(prompt):
                logits = lm.lm_head.output.save()
    with lm.trace(PROMPT):
        plain = lm.lm_head.output.save()
    torch.testing.assert_close(logits, torch.roll(plain, 1, dims=-1), atol=1e-5, rtol=1e-5)


def test_edit_that_is_trained(net, x):
    """A low-rank update in an edit learns from a loss outside of the block."""
    model = NNsight(net.requires_grad_(requires_grad=False))
    down, up = nn.Parameter(torch.ones(4, 1)), nn.Parameter(torch.zeros(1, 4))
    with model.edit() as edited:
        edited[0].output = edited[0].output + edited[0].input @ down @ up
    _out(edited, x).sum().backward()
    assert up.grad is not None
    with torch.no_grad():
        up += 1
    torch.testing.assert_close(_out(edited, x), net[1:](net[0](x) + x @ down @ up))


def test_edit_keeps_nothing(model, x):
    """A save in an edit is refused, and the failed edit is none."""
    with pytest.raises(InvalidInput, match="keeps no values"), model.edit(inplace=True):
        model[0].output.save()
    assert model.edits == []
    with pytest.raises(InvalidInput, match="inside a trace"), model.trace(x), model.edit():
        pass


def test_python_function_in_an_edit(model, net, x):
    """A module of the researcher that cannot be recorded works here, and is refused for a cluster."""

    class Odd(nn.Module):
        def forward(self, value):
            return value * (2 if value.sum() > -1e9 else 3)

    model[0].odd = Odd()
    with model.edit() as edited:
        edited[0].output = edited[0].odd(edited[0].output)
    torch.testing.assert_close(_out(edited, x), net[1:](net[0](x) * 2))
    with pytest.raises(InvalidInput, match="cannot be sent"), edited.trace(x, remote=True):
        pass
