"""Runs on a sharded model: what is gathered, by whom it is kept, and what the model goes on with."""

import pytest
import torch
from torch import nn

from nnsight_hpc.execution import run_graph
from nnsight_hpc.graph import Ref


class Halves:
    """A view in one process: the whole of what the first layer gives is itself and, as a second half, its double."""

    def __init__(self, *, keeps=True):
        self.keeps = keeps
        self.calls = []

    def prepare(self, call, operations):
        self.calls.append(("prepare", call.generate, tuple(sorted(operations))))

    def sharded(self, path, side):
        return (path, side) in {("0", "output"), ("1", "input")}

    def whole(self, path, side, tree, *, root_only=False):
        self.calls.append(("whole", path, side, root_only))
        return _map(tree, lambda x: torch.cat([x, 2 * x], -1))

    def own(self, path, side, tree):
        self.calls.append(("own", path, side))
        return _map(
            tree, lambda x: x[..., : x.shape[-1] // 2].contiguous()
        )  # a layer may add up strided rows otherwise

    def parameter(self, tensor):
        self.calls.append(("parameter", tuple(tensor.shape)))
        return tensor.clone()

    def agree(self, decision):
        self.calls.append(("agree", decision))
        return decision


def _map(tree, change):
    if isinstance(tree, torch.Tensor):
        return change(tree)
    return type(tree)(_map(item, change) for item in tree) if isinstance(tree, tuple) else tree


def gathered_for(view):
    """The calls of a view but for the first, which every forward makes."""
    assert view.calls[0] == ("prepare", False, ())
    return view.calls[1:]


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 8)).requires_grad_(requires_grad=False)


def test_what_is_only_saved_is_gathered_once_and_for_the_root_alone(net, x, builder):
    """The model goes on with its own value, which nobody has changed."""
    node = builder.add("model.output", Ref(0), "0")
    first, again = builder.add("save", Ref(node)), builder.add("save", Ref(node))
    end = builder.add("save", Ref(builder.add("model.output", Ref(0), "")))
    view = Halves()
    got = run_graph(builder.graph(first=first, again=again, end=end), {"x": x}, net, view=view)
    half = net[0](x)
    assert torch.equal(torch.cat([half, 2 * half], -1), got["first"])
    assert torch.equal(got["first"], got["again"])
    assert torch.equal(net(x), got["end"])
    assert gathered_for(view) == [("whole", "0", "output", True)]


def test_a_value_that_is_used_is_gathered_everywhere(net, x, builder):
    """An operation runs in all processes alike; a look changes nothing of what the model goes on with."""
    node = builder.add("operator.mul", Ref(builder.add("model.output", Ref(0), "0")), 3)
    view = Halves()
    got = run_graph(builder.graph(saved=builder.add("save", Ref(node))), {"x": x}, net, view=view)
    half = net[0](x)
    assert torch.equal(3 * torch.cat([half, 2 * half], -1), got["saved"])
    assert gathered_for(view) == [("whole", "0", "output", False)]


@pytest.mark.parametrize("in_place", [False, True])
def test_the_model_goes_on_with_its_part_of_what_was_changed(net, x, builder, in_place):
    """Replaced by another value or changed in place."""
    node = builder.add("model.output", Ref(0), "0")
    if in_place:
        builder.add("operator.setitem", Ref(node), (slice(None), 3), 7.0)
    else:
        builder.add("model.set_output", Ref(0), "0", Ref(builder.add("operator.neg", Ref(node))))
    end = builder.add("save", Ref(builder.add("model.output", Ref(0), "")))
    view = Halves()
    got = run_graph(builder.graph(end=end), {"x": x}, net, view=view)
    half = net[0](x)
    if in_place:
        half[:, 3] = 7.0
    assert torch.equal(net[1](half if in_place else -half), got["end"])
    assert gathered_for(view) == [("whole", "0", "output", False), ("own", "0", "output")]


def test_what_is_replaced_without_a_look_is_not_gathered(net, x, builder):
    """The new value is whole."""
    zeros = builder.add("torch.zeros", [x.shape[0], 12])
    builder.add("model.set_output", Ref(0), "0", Ref(zeros))
    end = builder.add("save", Ref(builder.add("model.output", Ref(0), "")))
    view = Halves()
    got = run_graph(builder.graph(end=end), {"x": x}, net, view=view)
    assert torch.equal(net[1](torch.zeros(x.shape[0], 6)), got["end"])
    assert gathered_for(view) == [("own", "0", "output")]


def test_a_skipped_module_hands_on_its_part(net, x, builder):
    """What stands in for its output is whole, for nodes and for the model."""
    zeros = builder.add("torch.ones", [x.shape[0], 12])
    builder.add("model.skip", Ref(0), "0", Ref(zeros))
    end = builder.add("save", Ref(builder.add("model.output", Ref(0), "")))
    got = run_graph(builder.graph(end=end), {"x": x}, net, view=Halves())
    assert torch.equal(net[1](torch.ones(x.shape[0], 6)), got["end"])


def test_only_one_process_keeps_what_is_saved(net, x, builder):
    """The others run the graph and return nothing; they copy nothing either."""
    node = builder.add("model.output", Ref(0), "0")
    builder.add("operator.setitem", Ref(node), (slice(None), 3), 7.0)
    saved = builder.add("save", Ref(node))
    view = Halves(keeps=False)
    assert run_graph(builder.graph(saved=saved), {"x": x}, net, view=view) == {}
    assert ("whole", "0", "output", False) in view.calls


def test_parameters_are_whole_and_decisions_are_agreed_on(net, x, builder):
    """The view is asked for both."""
    weight = builder.add("model.parameter", "0", "weight")
    condition = builder.add("operator.gt", Ref(builder.add("Tensor.sum", Ref(weight))), 1e6)
    branch = builder.add("control.if", Ref(condition))
    builder.add("log", "large", block=branch)
    saved = builder.add("save", Ref(weight))
    view = Halves()
    got = run_graph(builder.graph(saved=saved), {"x": x}, net, view=view)
    assert torch.equal(net[0].weight, got["saved"])
    assert {("parameter", (6, 6)), ("agree", False)} <= set(view.calls)


def test_a_module_that_the_graph_calls_takes_and_gives_whole_values(net, x, builder):
    """Its own arguments and results are parts."""
    called = builder.add("model.call", "1", Ref(builder.add("torch.ones", [2, 12])))
    saved = builder.add("save", Ref(called))
    got = run_graph(builder.graph(saved=saved), {"x": x}, net, view=Halves())
    assert torch.equal(net[1](torch.ones(2, 6)), got["saved"])


def test_gradients_are_those_of_the_whole_value(net, x, builder):
    """The model's path to the loss leads through the whole value."""
    node = builder.add("model.output", Ref(0), "0")
    loss = builder.add("Tensor.sum", Ref(builder.add("model.output", Ref(0), "")))
    grad = builder.add("grad.read", Ref(node))
    builder.add("grad.backward", Ref(loss))
    got = run_graph(builder.graph(grad=builder.add("save", Ref(grad))), {"x": x}, net, view=Halves())
    own = net[1].weight.sum(0).expand(x.shape[0], 6)
    assert torch.allclose(torch.cat([own, torch.zeros_like(own)], -1), got["grad"])
