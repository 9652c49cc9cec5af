"""Modules of the researcher in the envoy tree."""

import pytest
import torch
from torch import nn

from nnsight_hpc import Graph
from nnsight_hpc.execution import run_graph
from nnsight_hpc.wire.errors import InvalidInput


@pytest.fixture
def sae():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 4)).eval()


def test_recorded_as_its_operations(model, net, x, sae):
    """A module that is made of allowed operations is in the graph, its weights as constants, once each."""
    model[0].sae = sae
    with model.trace(x) as tracer:
        model[0].output = model[0].sae(model[0].output)
        model[1].output = model[0].sae(model[1].output)
        out = model.output.save()
    expected = net[2](sae(net[1](sae(net[0](x)))))
    torch.testing.assert_close(out, expected)
    graph = Graph.from_json(tracer.graph.to_json())
    torch.testing.assert_close(run_graph(graph, tracer.graph.tensors, net)["out"], expected)
    assert len(tracer.graph.tensors) == 1 + len(list(sae.parameters()))


def test_trained_in_place(model, net, x, sae):
    """Its parameters take gradients from a loss outside of the block."""
    net.requires_grad_(requires_grad=False)
    model[0].sae = sae
    with model.trace(x):
        out = model[0].sae(model[0].output).save()
    out.sum().backward()
    expected = torch.autograd.grad(sae(net[0](x)).sum(), sae[0].weight)[0]
    torch.testing.assert_close(sae[0].weight.grad, expected)


def test_what_cannot_be_recorded_is_called_whole(model, net, x):
    """A module that looks at a value runs in this process, and is refused with its line for a cluster."""

    class Gate(nn.Module):
        def forward(self, value):
            return value if value.mean() > 1e9 else -value

    model[0].gate = Gate()
    with model.trace(x):
        out = model[0].gate(model[0].output).save()
    torch.testing.assert_close(out, -net[0](x))
    with pytest.raises(InvalidInput, match="cannot be sent") as caught, model.trace(x, remote=True):
        model[0].gate(model[0].output)
    assert "model[0].gate(model[0].output)" in str(caught.value)


def test_names_of_the_model_stay_its_own(model, sae):
    """Only a new name can be attached to, and only a module."""
    with pytest.raises(AttributeError, match="cannot be set"):
        model.sae = 3
    with pytest.raises(AttributeError, match="cannot be set"):
        setattr(model, "0", sae)
    model[1].sae = sae
    assert "sae" in dir(model[1])
    assert "sae" not in dir(model[0])
    assert repr(model[1].sae) == repr(sae)
