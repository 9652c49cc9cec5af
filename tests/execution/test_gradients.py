"""Gradients of a graph against autograd on the same modules."""

import pytest
import torch

from nnsight_hpc.execution import run_graph
from nnsight_hpc.graph import Ref
from nnsight_hpc.graph.build import BACKWARD, INVOKE, PARAMETER, READ_GRAD, SAVE, SET_GRAD
from nnsight_hpc.graph.nodes import TensorRef
from nnsight_hpc.wire.errors import InvalidGraph


@pytest.fixture
def loss(builder):
    """Add the sum of squares of the model's last output, and its backward."""

    def add(where=0):
        out = builder.add("model.output", Ref(where), "2")
        builder.add(BACKWARD, Ref(builder.add("Tensor.sum", Ref(builder.add("operator.pow", Ref(out), 2)))))

    return add


def gradient(net, hidden, change=lambda grad: grad):
    """The gradient of the sum of squares with regard to `hidden`, with one change on the way after the activation."""
    hidden = hidden.detach().requires_grad_()
    after = net[1](hidden)
    after.register_hook(change)
    (net[2](after) ** 2).sum().backward()
    return hidden.grad


def test_gradient_is_read(net, x, builder, loss):
    """The gradient of a layer's output, asked for before the backward; no weight gets one."""
    grad = builder.add(READ_GRAD, Ref(builder.add("model.output", Ref(0), "0")))
    loss()
    got = run_graph(builder.graph(g=builder.add(SAVE, Ref(grad))), {"x": x}, net)
    assert torch.equal(got["g"], gradient(net, net[0](x)))
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize("how", ["set", "in place"])
def test_gradient_is_changed_on_the_way(net, x, builder, loss, how):
    """A gradient that is replaced or changed in place is what goes on to earlier layers."""
    hidden = builder.add("model.output", Ref(0), "0")
    after = builder.add("model.output", Ref(0), "1")
    grad = builder.add(READ_GRAD, Ref(after))
    if how == "set":
        builder.add(SET_GRAD, Ref(after), Ref(builder.add("operator.mul", Ref(grad), 2.0)))
    else:
        builder.add("operator.imul", Ref(grad), 2.0)
    early = builder.add(READ_GRAD, Ref(hidden))
    loss()
    got = run_graph(builder.graph(g=builder.add(SAVE, Ref(early))), {"x": x}, net)
    assert torch.equal(got["g"], gradient(net, net[0](x), lambda grad: grad * 2))


def test_gradient_of_some_rows(net, x, builder, loss):
    """An invoke's gradient has its own rows; a loss over its rows leaves the others without any."""
    part = builder.add(INVOKE, Ref(0), 1, 2)
    grad = builder.add(READ_GRAD, Ref(builder.add("model.output", Ref(part), "0")))
    loss(part)
    got = run_graph(builder.graph(g=builder.add(SAVE, Ref(grad))), {"x": x}, net)
    assert torch.allclose(got["g"], gradient(net, net[0](x[1:2])), atol=1e-6)


def test_in_place_change_before_the_backward(net, x, builder, loss):
    """A layer's output that is changed in place keeps being differentiable, and its gradient is that of the new value."""
    hidden = builder.add("model.output", Ref(0), "0")
    builder.add("operator.imul", Ref(hidden), 3.0)
    grad = builder.add(READ_GRAD, Ref(hidden))
    loss()
    got = run_graph(builder.graph(g=builder.add(SAVE, Ref(grad))), {"x": x}, net)
    assert torch.equal(got["g"], gradient(net, net[0](x) * 3))


def test_value_that_the_loss_does_not_depend_on(net, x, builder, loss):
    """Its gradient is None, as in torch; to set it is an error that says so."""
    side = builder.add("operator.mul", Ref(builder.add("model.output", Ref(0), "0")), 2)
    grad = builder.add(READ_GRAD, Ref(side))
    loss()
    assert run_graph(builder.graph(g=builder.add(SAVE, Ref(grad))), {"x": x}, net)["g"] is None
    builder.add(SET_GRAD, Ref(side), 1.0)
    loss()
    with pytest.raises(ValueError, match="does not depend on this value"):
        run_graph(builder.graph(), {"x": x}, net)


def test_gradient_without_a_backward_is_refused(net, x, builder):
    """It is said before the model runs."""
    builder.add(READ_GRAD, Ref(builder.add("model.output", Ref(0), "0")))
    with pytest.raises(InvalidGraph, match="no backward"):
        run_graph(builder.graph(), {"x": x}, net)


def test_gradient_of_a_parameter_is_refused(net, x, builder, loss):
    """Weights are shared, and take no gradients."""
    builder.add(READ_GRAD, Ref(builder.add(PARAMETER, "0", "weight")))
    loss()
    with pytest.raises(InvalidGraph, match="parameters are not computed"):
        run_graph(builder.graph(), {"x": x}, net)


def test_tensor_of_the_caller_gets_its_gradient(net, x, builder, loss):
    """A constant that requires grad is differentiated through the model, and its `.grad` is added to."""
    mine = torch.zeros(net[0].out_features, requires_grad=True)
    hidden = builder.add("model.output", Ref(0), "0")
    builder.add("model.set_output", Ref(0), "0", Ref(builder.add("operator.add", Ref(hidden), TensorRef("mine"))))
    loss()
    run_graph(builder.graph(), {"x": x, "mine": mine}, net)
    assert torch.allclose(mine.grad, gradient(net, net[0](x)).sum(0))


def test_saved_values_keep_their_history(net, x, builder):
    """After `requires_grad_()` in the graph what is saved can be differentiated outside, by what was saved, too."""
    hidden = builder.add("Tensor.requires_grad_", Ref(builder.add("model.output", Ref(0), "0")))
    out = builder.add("model.output", Ref(0), "2")
    saves = {name: builder.add(SAVE, Ref(value)) for name, value in {"hidden": hidden, "out": out}.items()}
    got = run_graph(builder.graph(**saves), {"x": x}, net)
    grad = torch.autograd.grad((got["out"] ** 2).sum(), got["hidden"])[0]
    assert torch.equal(grad, gradient(net, net[0](x)))
    assert all(parameter.grad is None for parameter in net.parameters())
