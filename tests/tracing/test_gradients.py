"""Gradients of values, against autograd on the plain module."""

import pytest
import torch
from torch import nn

from nnsight_hpc import NNsight


@pytest.fixture
def expected(net, x):
    """The gradient of the summed output with regard to the first layer's output."""
    hidden = net[0](x).detach().requires_grad_()
    net[2](net[1](hidden)).sum().backward()
    return hidden.grad


@pytest.mark.parametrize("how", ["before", "after", "block", "next line"])
def test_gradient_of_a_value(model, x, expected, how):
    """`x.grad` is read before the backward, after it, or in its block."""
    with model.trace(x):
        hidden = model[0].output
        loss = model.output.sum()
        if how == "before":
            grad = hidden.grad.save()
            loss.backward()
        if how == "after":
            loss.backward()
            grad = hidden.grad.save()
        if how == "block":
            with loss.backward():
                grad = hidden.grad.save()
        if how == "next line":
            loss.backward()
            same = hidden.grad
            grad = same.save()
    torch.testing.assert_close(grad, expected)


def test_two_backwards(model, net, x):
    """A gradient belongs to the backward in whose block it is read, or to the next one."""
    with model.trace(x):
        hidden = model[0].output
        out = model.output
        with out[:, 0].sum().backward(retain_graph=True):
            first = hidden.grad.save()
        second = hidden.grad.save()
        out[:, 1].sum().backward()
    for column, grad in enumerate((first, second)):
        leaf = net[0](x).detach().requires_grad_()
        net[2](net[1](leaf))[:, column].sum().backward()
        torch.testing.assert_close(grad, leaf.grad)


@pytest.mark.parametrize("how", ["set", "in place"])
def test_change_of_a_gradient_reaches_what_is_before(model, x, how):
    """A gradient that is set, or changed in place, is what flows on."""
    with model.trace(x):
        early = model[0].output
        late = model[1].output
        with model.output.sum().backward():
            if how == "set":
                late.grad = late.grad * 0
            else:
                late.grad[:] = 0
            grad = early.grad.save()
    assert torch.equal(grad, torch.zeros(3, 4))


def test_tensors_of_the_researcher_are_trained(net, x):
    """A tensor that wants a gradient gets it from a loss outside of the block: a steering vector is trained."""
    model = NNsight(net.requires_grad_(requires_grad=False))
    steer = nn.Parameter(torch.zeros(4))
    with model.trace(x):
        model[0].output = model[0].output + steer
        out = model.output.save()
    out.sum().backward()
    leaf = torch.zeros(4, requires_grad=True)
    net[2](net[1](net[0](x) + leaf)).sum().backward()
    torch.testing.assert_close(steer.grad, leaf.grad)


def test_no_grad_detaches(net, x):
    """Where gradients are off, what is returned has none."""
    steer = nn.Parameter(torch.zeros(4))
    model = NNsight(net)
    with torch.no_grad(), model.trace(x):
        model[0].output = model[0].output + steer
        out = model.output.save()
    assert not out.requires_grad
