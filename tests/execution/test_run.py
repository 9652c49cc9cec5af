"""Graphs against plain PyTorch hooks on the same module: bit for bit."""

import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from nnsight_hpc.execution import run_graph
from nnsight_hpc.execution.run import Run
from nnsight_hpc.graph import GraphBuilder, Ref, TensorRef
from nnsight_hpc.wire.errors import ExecutionFailed, InvalidGraph, RequestCancelled
from nnsight_hpc.wire.messages import ModelIdentity
from tests.execution.conftest import hooked


def _no_hooks(module):
    return not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_reads_every_output_and_input(net, x, builder):
    """Outputs and inputs of all modules are what hooks see."""
    ids = {f"{kind}{i}": builder.add(f"model.{kind}", Ref(0), str(i)) for i in range(5) for kind in ("output", "input")}
    saves = {name: builder.add("save", Ref(node)) for name, node in ids.items()}
    got = run_graph(builder.graph(**saves), {"x": x}, net)
    value = x
    for i, layer in enumerate(net):
        assert torch.equal(got[f"input{i}"], value)
        value = layer(value)
        assert torch.equal(got[f"output{i}"], value)


def test_replaced_output_flows_on(net, x, builder):
    """A replaced output is what the next module gets."""
    value = builder.add("model.output", Ref(0), "1")
    doubled = builder.add("operator.mul", Ref(value), 2)
    builder.add("model.set_output", Ref(0), "1", Ref(doubled))
    end = builder.add("save", Ref(builder.add("model.output", Ref(0), "")))
    with hooked(net[1], lambda _m, _i, out: out * 2):
        expected = net(x)
    assert torch.equal(run_graph(builder.graph(end=end), {"x": x}, net)["end"], expected)


def test_replaced_input_flows_on(net, x, builder):
    """A replaced input is what the module computes with."""
    value = builder.add("model.input", Ref(0), "2")
    builder.add("model.set_input", Ref(0), "2", Ref(builder.add("operator.neg", Ref(value))))
    end = builder.add("save", Ref(builder.add("model.output", Ref(0), "")))
    assert torch.equal(run_graph(builder.graph(end=end), {"x": x}, net)["end"], net[2:](-net[:2](x)))


def test_change_in_place_and_the_value_saved_before_it(net, x, builder):
    """A save keeps the value at its place in the program, though the same memory is changed later."""
    value = builder.add("model.output", Ref(0), "2")
    before = builder.add("save", Ref(value))
    builder.add("operator.setitem", Ref(value), (slice(None), [1, 3]), 10.0)
    after = builder.add("save", Ref(value))
    end = builder.add("save", Ref(builder.add("model.output", Ref(0), "")))
    got = run_graph(builder.graph(before=before, after=after, end=end), {"x": x}, net)
    hidden = net[:3](x)
    assert torch.equal(got["before"], hidden)
    hidden[:, [1, 3]] = 10.0
    assert torch.equal(got["after"], hidden)
    assert torch.equal(got["end"], net[3:](hidden))


def test_earlier_layer_may_be_written_after_a_later_one(net, x, builder):
    """Independent operations need no order: the program reads layer 4 first and layer 0 second."""
    late = builder.add("save", Ref(builder.add("model.output", Ref(0), "4")))
    early = builder.add("save", Ref(builder.add("model.output", Ref(0), "0")))
    got = run_graph(builder.graph(late=late, early=early), {"x": x}, net)
    assert torch.equal(got["early"], net[0](x))
    assert torch.equal(got["late"], net(x))


def test_read_before_a_change_sees_the_old_value(net, x, builder):
    """What the program computes from a value before it changes it, is computed from the old value."""
    value = builder.add("model.output", Ref(0), "0")
    total = builder.add("save", Ref(builder.add("torch.sum", Ref(value))))
    builder.add("Tensor.zero_", Ref(value))
    zero = builder.add("save", Ref(builder.add("torch.sum", Ref(value))))
    got = run_graph(builder.graph(total=total, zero=zero), {"x": x}, net)
    assert torch.equal(got["total"], net[0](x).sum())
    assert got["zero"] == 0


def test_later_layer_in_an_earlier_one_is_refused(net, x, builder):
    """A change that needs a value of a later layer is refused, with both points in the message."""
    later = builder.add("model.output", Ref(0), "2")
    builder.add("model.set_output", Ref(0), "0", Ref(later))
    with pytest.raises(InvalidGraph) as caught:
        run_graph(builder.graph(), {"x": x}, net)
    assert "0.output" in str(caught.value)
    assert "2.output" in str(caught.value)
    assert _no_hooks(net)


def test_change_that_comes_too_late_is_refused(net, x, builder):
    """A change in place that waits for a read at a later layer is refused instead of having no effect."""
    early = builder.add("model.output", Ref(0), "0")
    late = builder.add("model.output", Ref(0), "2")
    builder.add("torch.add", Ref(late), Ref(early))
    builder.add("Tensor.zero_", Ref(early))
    with pytest.raises(InvalidGraph, match=r"0\.output needs a value that is not there yet"):
        run_graph(builder.graph(), {"x": x}, net)


def test_forward_stops_when_nothing_later_is_needed(net, x, builder):
    """Layers after the last touched one are not run."""
    ran = []
    for layer in net:
        layer.register_forward_hook(lambda m, *_: ran.append(m))
    save = builder.add("save", Ref(builder.add("model.output", Ref(0), "1")))
    run_graph(builder.graph(s=save), {"x": x}, net)
    assert ran == [net[0], net[1]]


def test_only_touched_modules_get_hooks(net, x, builder):
    """While the model runs, exactly the modules that the graph names have hooks; afterwards none has."""
    seen = []
    forward = net[2].forward
    net[2].forward = lambda v: (seen.append([bool(m._forward_hooks) for m in net]), forward(v))[1]
    save = builder.add("save", Ref(builder.add("model.output", Ref(0), "3")))
    run_graph(builder.graph(s=save), {"x": x}, net)
    assert seen == [[False, False, False, True, False]]
    assert _no_hooks(net)


def test_error_names_line_operation_and_shapes_and_leaves_no_hook(net, x, builder):
    """An operation that fails raises its own type, with operation and shapes, and the module is as before."""
    value = builder.add("model.output", Ref(0), "0")
    builder.add("save", Ref(builder.add("operator.getitem", Ref(value), (0, 99))))
    with pytest.raises(IndexError) as caught:
        run_graph(builder.graph(), {"x": x}, net)
    assert isinstance(caught.value, ExecutionFailed)
    assert "operator.getitem(float32[3, 8], (0, 99))" in str(caught.value)
    assert _no_hooks(net)


def test_two_forwards_hand_a_value_on(net, x, builder):
    """A value of the first forward is patched into the second."""
    y = torch.ones_like(x)
    first = builder.add("model.output", Ref(0), "2")
    second = builder.add("model.forward", TensorRef("y"))
    value = builder.add("model.output", Ref(second), "2")
    builder.add("operator.setitem", Ref(value), 0, Ref(builder.add("operator.getitem", Ref(first), 1)))
    end = builder.add("save", Ref(builder.add("model.output", Ref(second), "")))
    hidden = net[:3](y)
    hidden[0] = net[:3](x)[1]
    assert torch.equal(run_graph(builder.graph(end=end), {"x": x, "y": y}, net)["end"], net[3:](hidden))


def test_module_called_on_a_value(net, x, builder):
    """A module that the graph calls computes on the value, and its own points do not fire."""
    value = builder.add("model.output", Ref(0), "2")
    called = builder.add("save", Ref(builder.add("model.call", "4", Ref(value))))
    end = builder.add("save", Ref(builder.add("model.output", Ref(0), "4")))
    got = run_graph(builder.graph(called=called, end=end), {"x": x}, net)
    assert torch.equal(got["called"], net[4](net[:3](x)))
    assert torch.equal(got["end"], net(x))


def test_second_call_of_a_module(x):
    """A module that runs twice in one forward has two outputs, by call."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, v):
            return self.inner(self.inner(v))

    net = Twice().requires_grad_(False)
    builder = GraphBuilder()
    builder.add("model.forward", TensorRef("x"))
    saves = {f"call{c}": builder.add("save", Ref(builder.add("model.output", Ref(0), "inner", call=c))) for c in (0, 1)}
    got = run_graph(builder.build(saves, ModelIdentity(id="t")), {"x": x}, net)
    assert torch.equal(got["call0"], net.inner(x))
    assert torch.equal(got["call1"], net(x))


def test_call_that_never_comes_is_named(net, x, builder):
    """Waiting for a second call of a module that runs once is an error that names the point."""
    builder.add("save", Ref(builder.add("model.output", Ref(0), "2", call=1)))
    with pytest.raises(InvalidGraph, match=r"did not reach 2\.output \(call 1\)"):
        run_graph(builder.graph(), {"x": x}, net)


def test_parameters_can_be_read_and_not_changed(net, x, builder):
    """A parameter is a value; changing it, or a view of it, is refused before anything runs."""
    weight = builder.add("model.parameter", "0", "weight")
    saved = builder.add("save", Ref(weight))
    assert torch.equal(run_graph(builder.graph(w=saved), {"x": x}, net)["w"], net[0].weight)
    before = net[0].weight.clone()
    row = builder.add("operator.getitem", Ref(builder.add("Tensor.t", Ref(weight))), 0)
    builder.add("Tensor.zero_", Ref(row))
    with pytest.raises(InvalidGraph, match="would change a parameter"):
        run_graph(builder.graph(), {"x": x}, net)
    assert torch.equal(net[0].weight, before)


def test_unknown_module_gets_near_names(net, x, builder):
    """A module that the model does not have is refused before it runs."""
    builder.add("model.output", Ref(0), "layers.0")
    with pytest.raises(InvalidGraph, match=r"the model has no module 'layers\.0'"):
        run_graph(builder.graph(), {"x": x}, net)


def test_missing_tensor_is_named(net, builder):
    """A tensor constant that was not sent is named."""
    with pytest.raises(InvalidGraph, match="the tensor 'x' of the graph is missing"):
        run_graph(builder.graph(), {}, net)


def test_cancelled_run_stops_and_leaves_no_hook(net, x, builder):
    """A cancelled run ends at its next step."""
    builder.add("save", Ref(builder.add("model.output", Ref(0), "0")))
    with pytest.raises(RequestCancelled):
        run_graph(builder.graph(), {"x": x}, net, cancelled=lambda: True)
    assert _no_hooks(net)


@pytest.mark.parametrize("apart", [False, True])
def test_values_are_dropped_after_their_last_use(net, x, builder, monkeypatch, apart):
    """In a chain of a hundred steps at most a few values are alive at once, also where it hangs on two points."""
    alive, most = weakref.WeakSet(), 0

    def counted(a, b):
        nonlocal most
        result = torch.add(a, b)
        alive.add(result)
        most = max(most, len(alive))
        return result

    monkeypatch.setattr("nnsight_hpc.execution.carrying.function_of", lambda _op: counted)
    value = builder.add("model.output", Ref(0), "0")
    if apart:
        value = builder.add("torch.add", Ref(value), Ref(builder.add("model.output", Ref(0), "1")))
    for _ in range(100):
        value = builder.add("torch.add", Ref(value), 1.0)
    save = builder.add("save", Ref(value))
    got = run_graph(builder.graph(s=save), {"x": x}, net)
    assert torch.allclose(got["s"], net[0](x) + (net[:2](x) if apart else 0) + 100)
    assert 1 <= most <= 3


def test_keyword_input_of_a_module(x):
    """`input` of a module that is called with keywords only is the first of them."""

    class Inner(nn.Module):
        def forward(self, *, value):
            return value + 1

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, v):
            return self.inner(value=v)

    builder = GraphBuilder()
    builder.add("model.forward", TensorRef("x"))
    value = builder.add("model.input", Ref(0), "inner")
    builder.add("model.set_input", Ref(0), "inner", Ref(builder.add("operator.mul", Ref(value), 3)))
    end = builder.add("save", Ref(builder.add("model.output", Ref(0), "")))
    got = run_graph(builder.build({"end": end}, ModelIdentity(id="o")), {"x": x}, Outer())
    assert torch.equal(got["end"], x * 3 + 1)


def test_gradients_are_off(net, x, builder):
    """Saved values carry no autograd graph, also when parameters want gradients."""
    net.requires_grad_(True)
    save = builder.add("save", Ref(builder.add("model.output", Ref(0), "0")))
    assert not run_graph(builder.graph(s=save), {"x": x}, net)["s"].requires_grad


def test_saved_value_is_not_changed_by_the_model_itself(x):
    """A model that adds to an activation in place does not change what was saved of it before."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, v):
            out = self.inner(v)
            out += v
            return out

    net = Residual().requires_grad_(False)
    builder = GraphBuilder()
    builder.add("model.forward", TensorRef("x"))
    inner = builder.add("save", Ref(builder.add("model.output", Ref(0), "inner")))
    end = builder.add("save", Ref(builder.add("model.output", Ref(0), "")))
    got = run_graph(builder.build({"inner": inner, "end": end}, ModelIdentity(id="r")), {"x": x}, net)
    assert torch.equal(got["inner"], net.inner(x))
    assert torch.equal(got["end"], net(x))


def test_saved_value_is_not_changed_at_a_later_point(net, x, builder):
    """A change of the next module's input, written earlier in the program, does not reach back into a saved output."""
    builder.add("operator.setitem", Ref(builder.add("model.input", Ref(0), "1")), slice(None), 0.0)
    save = builder.add("save", Ref(builder.add("model.output", Ref(0), "0")))
    assert torch.equal(run_graph(builder.graph(s=save), {"x": x}, net)["s"], net[0](x))


def test_later_trace_changes_a_value_and_not_the_earlier_forward(net, x, builder):
    """A value of the first forward that is changed after it, leaves that forward as it was."""
    value = builder.add("model.output", Ref(0), "0")
    first = builder.add("save", Ref(builder.add("model.output", Ref(0), "")))
    forward = builder.add("model.forward", TensorRef("y"))
    other = builder.add("operator.getitem", Ref(builder.add("model.output", Ref(forward), "0")), 0)
    builder.add("operator.setitem", Ref(value), 0, Ref(other))
    builder.add("model.set_output", Ref(forward), "2", Ref(value))
    second = builder.add("save", Ref(builder.add("model.output", Ref(forward), "")))
    y = torch.ones_like(x)
    got = run_graph(builder.graph(first=first, second=second), {"x": x, "y": y}, net)
    hidden = net[0](x)
    hidden[0] = net[0](y)[0]
    assert torch.equal(got["first"], net(x))
    assert torch.equal(got["second"], net[3:](hidden))


def test_result_of_a_call_may_be_changed_later(net, x, builder):
    """What a called module returns is new memory: a later layer may be added to it."""
    called = builder.add("model.call", "1", Ref(builder.add("model.output", Ref(0), "0")))
    builder.add("operator.iadd", Ref(called), Ref(builder.add("model.output", Ref(0), "2")))
    save = builder.add("save", Ref(called))
    assert torch.equal(run_graph(builder.graph(s=save), {"x": x}, net)["s"], net[:2](x) + net[:3](x))


def test_error_of_a_set_is_shown_at_its_own_line(net, x, builder):
    """Inputs that are no pair of arguments and keywords are an error of the set, not of the forward."""
    builder.add("model.set_inputs", Ref(0), "2", TensorRef("x"))
    with pytest.raises(ValueError, match=r"in model\.set_inputs\('2', float32\[3, 6\]\)"):
        run_graph(builder.graph(), {"x": x}, net)
    assert _no_hooks(net)


def test_threads_that_share_a_module_do_not_see_each_other(net, builder):
    """Forwards of several threads on one module at once each get their own values."""
    save = builder.add("save", Ref(builder.add("model.output", Ref(0), "1")))
    builder.add("Tensor.mul_", Ref(builder.add("model.output", Ref(0), "2")), 2)
    end = builder.add("save", Ref(builder.add("model.output", Ref(0), "")))
    graph = builder.graph(s=save, end=end)

    def right(number):
        x = torch.full((3, 6), float(number))
        got = run_graph(graph, {"x": x}, net)
        return torch.equal(got["s"], net[:2](x)) and torch.equal(got["end"], net[3:](net[:3](x) * 2))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(right, range(100)))


def test_forward_drops_the_values_that_it_was_given(net, x, builder, monkeypatch):
    """A value that a forward is called with is not kept until the end of the run."""
    made = builder.add("torch.mul", TensorRef("x"), 2)
    forward = builder.add("model.forward", Ref(made))
    save = builder.add("save", Ref(builder.add("model.output", Ref(forward), "4")))
    left = []
    go = Run.go
    monkeypatch.setattr(Run, "go", lambda run: (go(run), left.extend(run.values))[0])
    assert torch.equal(run_graph(builder.graph(s=save), {"x": x}, net)["s"], net(x * 2))
    assert left == [None] * 5


def test_error_of_a_subclass_is_caught_as_its_base(net, x, builder):
    """An exception of a type of torch's own is an instance of the builtin type that it derives from."""
    singular = builder.add("torch.zeros", (2, 2))
    builder.add("save", Ref(builder.add("torch.linalg.inv", Ref(singular))))
    with pytest.raises(RuntimeError, match=r"LinAlgError: linalg\.inv") as caught:
        run_graph(builder.graph(), {"x": x}, net)
    assert isinstance(caught.value, ExecutionFailed)
