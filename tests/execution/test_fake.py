"""Fake values of single nodes: shapes without data, errors at the user's line, sets, invokes, conditionals and loops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nnsight_hpc.execution import run_graph
from nnsight_hpc.execution.fake import UNKNOWN, Shadow
from nnsight_hpc.execution.fake_model import twin_of
from nnsight_hpc.graph import DType, Ref, TensorRef
from nnsight_hpc.graph.nodes import Device, Seed, Source
from nnsight_hpc.wire.errors import ExecutionFailed, InvalidGraph
from tests.execution.conftest import Builder

LINE = Source("script.py", 7, "wrong = hidden @ weight")


class Recorded:
    """A graph that is built and evaluated node by node, as a recorder does it."""

    def __init__(self, module, tensors, **forward):
        self.shadow, self.builder, self.tensors = Shadow(module), Builder(), tensors
        self.forward = self.builder.forward
        self.shadow.node(self.builder.nodes[self.forward], tensors)

    def add(self, op, *args, source=LINE, block=None, **kwargs):
        """Append a node; its id and its fake value."""
        node = self.builder.append(op, args, kwargs, source, block)
        return node, self.shadow.node(self.builder.nodes[node], self.tensors)


@pytest.fixture
def recorded(net, x):
    return Recorded(net, {"x": x})


OPERATIONS = [
    ("operator.add", (Ref(1), 1.5), {}),
    ("operator.getitem", (Ref(1), (slice(None), [1, 3])), {}),
    ("operator.getitem", (Ref(1), (0, slice(2, None))), {}),
    ("torch.matmul", (Ref(1), Ref(2)), {}),
    ("torch.softmax", (Ref(1), -1), {"dtype": DType("float64")}),
    ("torch.einsum", ("ab,ca->bc", Ref(1), Ref(2)), {}),
    ("Tensor.topk", (Ref(1), 2), {}),
    ("Tensor.to", (Ref(1), DType("bfloat16")), {}),
    ("Tensor.to", (Ref(1), Device("cuda")), {}),
    ("torch.cat", ([Ref(1), Ref(1)], 1), {}),
    ("torch.arange", (0, 9, 2), {}),
    ("einops.rearrange", (Ref(1), "a (b c) -> b a c"), {"b": 2}),
    ("torch.linalg.svd", (Ref(1),), {}),
    ("torch.fft.rfft", (Ref(1),), {}),
    ("torch.nn.functional.layer_norm", (Ref(1), [8]), {}),
    ("torch.randn", (3, 4), {"generator": Seed(3)}),
    ("operator.setitem", (Ref(1), (slice(None), 0), 4.0), {}),
    ("Tensor.masked_fill_", (Ref(1), TensorRef("mask"), 0.0), {}),
    ("Tensor.split", (Ref(1), 3), {"dim": 1}),
    ("attribute", (Ref(1), "shape"), {}),
]


def forms(value):
    """The form of each tensor in its place, in lists."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype, value.device
    return [forms(item) for item in value] if isinstance(value, tuple | list) else value


@pytest.mark.parametrize(("op", "args", "kwargs"), OPERATIONS, ids=[op for op, _, _ in OPERATIONS])
def test_operation_has_the_form_of_a_run(net, x, op, args, kwargs):
    """Shape, dtype and device of an operation's result are those of a run on real tensors."""
    tensors = {"x": x, "mask": torch.ones(3, 8, dtype=torch.bool)}
    recorded = Recorded(net, tensors)
    hidden, _ = recorded.add("model.output", Ref(0), "0")
    recorded.add("torch.transpose", Ref(hidden), 0, 1)
    node, fake = recorded.add(op, *args, **kwargs)
    save = recorded.builder.add("save", Ref(node))
    real = run_graph(recorded.builder.graph(r=save), tensors, net)["r"]
    expected, got = forms(real), forms(fake)
    assert expected == got


WRONG = [
    ("operator.getitem", (Ref(1), 99), IndexError),
    ("operator.getitem", (Ref(1), (0, 0, 0)), IndexError),
    ("operator.getitem", (Ref(1), "name"), (IndexError, TypeError)),
    ("operator.matmul", (Ref(1), Ref(1)), RuntimeError),
    ("operator.add", (Ref(1), TensorRef("x")), RuntimeError),
    ("torch.cat", ([Ref(1), TensorRef("x")],), RuntimeError),
    ("Tensor.view", (Ref(1), 7), RuntimeError),
    ("torch.sum", (Ref(1), 5), IndexError),
    ("torch.nn.functional.linear", (Ref(1), TensorRef("x")), RuntimeError),
    ("torch.einsum", ("ab,bc->ac", Ref(1), Ref(1)), RuntimeError),
    ("operator.or_", (Ref(1), Ref(1)), RuntimeError),
    ("Tensor.bitwise_and", (Ref(1), 3), RuntimeError),
    ("Tensor.squeeze", (Ref(1), "a"), (RuntimeError, TypeError)),
    ("Tensor.reshape", (Ref(1), -1, 7), RuntimeError),
    ("torch.stack", ([Ref(1), TensorRef("x")],), RuntimeError),
    ("torch.gather", (Ref(1), 0, Ref(1)), RuntimeError),
    ("attribute", (Ref(1), "no_such_thing"), AttributeError),
    ("einops.rearrange", (Ref(1), "a b c -> c b a"), Exception),
    ("model.call", ("0", Ref(1)), RuntimeError),
]


@pytest.mark.parametrize(("op", "args", "kind"), WRONG, ids=[f"{op} {n}" for n, (op, _, _) in enumerate(WRONG)])
def test_wrong_index_shape_or_dtype_is_an_error_at_the_line(recorded, x, op, args, kind):
    """What cannot work raises at once, with the line, the operation and the shapes, as the type that a run raises."""
    recorded.add("model.output", Ref(0), "0")
    with pytest.raises(kind) as caught:
        recorded.add(op, *args)
    assert isinstance(caught.value, ExecutionFailed)
    assert str(caught.value).startswith(str(LINE))
    assert op in str(caught.value)
    with pytest.raises(ExecutionFailed) as real:
        run_graph(recorded.builder.graph(), {"x": x}, _real_net())
    assert type(real.value).__name__ == type(caught.value).__name__
    if op != "model.call":  # a module on fakes fails in torch's own words for them
        assert real.value.what == caught.value.what


def _real_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 5)).requires_grad_(False)


DATA = ["Tensor.item", "torch.nonzero", "Tensor.tolist", "torch.unique", "torch.argwhere"]


@pytest.mark.parametrize("op", DATA)
def test_what_depends_on_data_is_unknown(recorded, op):
    """Results that depend on data, and what is computed from them, are unknown and no error."""
    hidden, _ = recorded.add("model.output", Ref(0), "0")
    total, _ = recorded.add("torch.sum", Ref(hidden))
    node, value = recorded.add(op, Ref(total if op == "Tensor.item" else hidden))
    assert value is UNKNOWN
    assert not value
    assert recorded.add("operator.add", Ref(node), 1)[1] is UNKNOWN
    assert recorded.add("torch.zeros", Ref(node))[1] is UNKNOWN


def test_indexing_by_a_mask(recorded):
    """Reading by a mask has an unknown shape; writing by one leaves the shape of what is written to."""
    hidden, _ = recorded.add("model.output", Ref(0), "0")
    mask, _ = recorded.add("operator.gt", Ref(hidden), 0)
    assert recorded.add("operator.getitem", Ref(hidden), Ref(mask))[1] is UNKNOWN
    assert recorded.add("operator.setitem", Ref(hidden), Ref(mask), 0.0)[1].shape == (3, 8)
    assert recorded.add("operator.add", Ref(hidden), 1)[1].shape == (3, 8)


def test_wrong_input_of_the_model_is_an_error_at_the_forward(net):
    """A forward that cannot run on inputs of that shape raises where it is recorded."""
    with pytest.raises(RuntimeError, match="must have same reduction dim"):
        Recorded(net, {"x": torch.zeros(3, 7)})


def test_module_and_parameter_that_are_not_there(recorded):
    """A path that the model does not have is refused with near names."""
    with pytest.raises(InvalidGraph, match=r"no module '7'"):
        recorded.add("model.output", Ref(0), "7")
    with pytest.raises(InvalidGraph, match=r"no parameter '0\.wieght'[\s\S]*0\.weight"):
        recorded.add("model.parameter", "0", "wieght")


def test_parameter_and_call(recorded):
    """Parameters have their shapes, and a module of the model can be called on a value."""
    assert recorded.add("model.parameter", "2", "weight")[1].shape == (8, 8)
    hidden, _ = recorded.add("model.output", Ref(0), "1")
    assert recorded.add("model.call", "4", Ref(hidden))[1].shape == (3, 5)


def test_set_of_the_same_form_runs_the_model_once(recorded, net):
    """A value of the model's own form changes nothing later, and is what is read at its point."""
    hidden, _ = recorded.add("model.output", Ref(0), "0")
    doubled, value = recorded.add("operator.mul", Ref(hidden), 2)
    recorded.add("model.set_output", Ref(0), "0", Ref(doubled))
    assert recorded.add("model.output", Ref(0), "0")[1].untyped_storage()._cdata == value.untyped_storage()._cdata
    assert recorded.add("model.output", Ref(0), "4")[1].shape == (3, 5)
    assert twin_of(net).runs == 1


def test_set_of_another_form_changes_what_comes_later(recorded, net):
    """With one row in the place of three, later points have one row."""
    hidden, _ = recorded.add("model.output", Ref(0), "0")
    row, _ = recorded.add("operator.getitem", Ref(hidden), slice(0, 1))
    recorded.add("model.set_output", Ref(0), "0", Ref(row))
    assert recorded.add("model.output", Ref(0), "4")[1].shape == (1, 5)
    assert recorded.add("model.input", Ref(0), "2")[1].shape == (1, 8)
    assert recorded.add("model.result", Ref(0))[1].shape == (1, 5)
    other = Recorded(net, {"x": torch.zeros(3, 6)})
    assert other.add("model.output", Ref(0), "4")[1].shape == (3, 5)


@pytest.mark.parametrize("op", ["model.set_output", "model.skip"])
def test_set_that_the_model_cannot_go_on_with_is_an_error(recorded, op):
    """A replaced output of a width that the next layer does not take raises at the line of the set."""
    hidden, _ = recorded.add("model.output", Ref(0), "0")
    narrow, _ = recorded.add("operator.getitem", Ref(hidden), (slice(None), slice(0, 3)))
    with pytest.raises(RuntimeError) as caught:
        recorded.add(op, Ref(0), "0", Ref(narrow))
    assert str(caught.value).startswith(str(LINE))


def test_set_input(recorded):
    """A replaced first argument is what is read afterwards, alone and among all inputs."""
    value, _ = recorded.add("torch.zeros", 2, 8)
    recorded.add("model.set_input", Ref(0), "2", Ref(value))
    assert recorded.add("model.input", Ref(0), "2")[1].shape == (2, 8)
    assert recorded.add("model.inputs", Ref(0), "2")[1][0][0].shape == (2, 8)
    assert recorded.add("model.output", Ref(0), "2")[1].shape == (2, 8)


def test_inside_of_a_skipped_module_nothing_is_known():
    """Modules inside of a skipped one do not run."""
    recorded = Recorded(nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Tanh()), {"x": torch.zeros(2, 4)})
    value, _ = recorded.add("torch.zeros", 2, 4)
    recorded.add("model.skip", Ref(0), "0", Ref(value))
    assert recorded.add("model.output", Ref(0), "0.0")[1] is UNKNOWN
    assert recorded.add("model.output", Ref(0), "0")[1].shape == (2, 4)


def test_invoke_sees_its_rows(recorded):
    """Values of an invoke have its rows only; a set of as many rows is right, of others an error."""
    invoke, _ = recorded.add("model.invoke", Ref(0), 1, 3)
    assert recorded.add("model.output", Ref(invoke), "0")[1].shape == (2, 8)
    assert recorded.add("model.result", Ref(invoke))[1].shape == (2, 5)
    right, _ = recorded.add("torch.zeros", 2, 8)
    recorded.add("model.set_output", Ref(invoke), "0", Ref(right))
    wrong, _ = recorded.add("torch.zeros", 3, 8)
    with pytest.raises(RuntimeError):
        recorded.add("model.set_output", Ref(invoke), "0", Ref(wrong))


def test_gradient_has_the_form_of_its_value(recorded):
    """A gradient is like its value; a loss of many numbers is refused as torch does it."""
    hidden, _ = recorded.add("model.output", Ref(0), "0")
    with pytest.raises(RuntimeError, match="only for scalar outputs"):
        recorded.add("grad.backward", Ref(hidden))
    loss, _ = recorded.add("torch.sum", Ref(hidden))
    backward, _ = recorded.add("grad.backward", Ref(loss))
    assert recorded.add("grad.read", Ref(hidden), backward=Ref(backward))[1].shape == (3, 8)


def test_conditional_on_something_known_takes_its_branch(recorded):
    """With a known condition only the branch that runs is looked at, and what it gives is known."""
    hidden, _ = recorded.add("model.output", Ref(0), "0")
    shape, _ = recorded.add("attribute", Ref(hidden), "shape")
    rows, _ = recorded.add("operator.getitem", Ref(shape), 0)
    many, _ = recorded.add("operator.gt", Ref(rows), 90)
    branch, _ = recorded.add("control.if", Ref(many))
    far, value = recorded.add("operator.getitem", Ref(hidden), 90, block=branch)
    assert value is UNKNOWN
    otherwise, _ = recorded.add("control.else", Ref(branch))
    first, _ = recorded.add("operator.getitem", Ref(hidden), 0, block=otherwise)
    assert recorded.add("control.merge", Ref(branch), Ref(far), Ref(first))[1].shape == (8,)


def test_conditional_on_data(recorded):
    """Of an unknown condition both branches are looked at; their merge is known where they agree."""
    hidden, _ = recorded.add("model.output", Ref(0), "0")
    total, _ = recorded.add("torch.sum", Ref(hidden))
    positive, _ = recorded.add("operator.gt", Ref(total), 0)
    branch, _ = recorded.add("control.if", Ref(positive))
    one, _ = recorded.add("operator.getitem", Ref(hidden), 0, block=branch)
    otherwise, _ = recorded.add("control.else", Ref(branch))
    other, _ = recorded.add("operator.getitem", Ref(hidden), 1, block=otherwise)
    wide, _ = recorded.add("operator.getitem", Ref(hidden), slice(1, 3), block=otherwise)
    assert recorded.add("control.merge", Ref(branch), Ref(one), Ref(other))[1].shape == (8,)
    assert recorded.add("control.merge", Ref(branch), Ref(one), Ref(wide))[1] is UNKNOWN
    with pytest.raises(IndexError):
        recorded.add("operator.getitem", Ref(hidden), 44, block=otherwise)


def _loop(recorded, over):
    start, _ = recorded.add("control.loop", over)
    item, value = recorded.add("control.item", Ref(start), block=start)
    return start, item, value


def test_loop_over_a_tensor(recorded):
    """The item of a loop is a row; what is collected is a list of as many as there are rows."""
    hidden, _ = recorded.add("model.output", Ref(0), "0")
    start, item, value = _loop(recorded, Ref(hidden))
    assert value.shape == (8,)
    norm, _ = recorded.add("torch.sum", Ref(item), block=start)
    end, _ = recorded.add("control.end", Ref(start))
    collected, values = recorded.add("control.collect", Ref(end), Ref(norm))
    assert [value.shape for value in values] == [()] * 3
    assert recorded.add("torch.stack", Ref(collected))[1].shape == (3,)
    assert recorded.add("control.final", Ref(end), Ref(norm))[1].shape == ()


def test_loop_that_changes_a_shape_has_unknown_results(recorded):
    """A variable that grows from pass to pass, and a slice whose length is the pass, are unknown after the loop."""
    hidden, _ = recorded.add("model.output", Ref(0), "0")
    numbers, _ = recorded.add("control.range", 1, 4, 1)
    start, item, _ = _loop(recorded, Ref(numbers))
    carried, value = recorded.add("control.carried", Ref(start), Ref(hidden), block=start)
    assert value.shape == (3, 8)
    grown, _ = recorded.add("torch.cat", [Ref(carried), Ref(hidden)], block=start)
    part, _ = recorded.add("operator.getitem", Ref(hidden), slice(0, Ref(item)), block=start)
    recorded.add("control.next", Ref(carried), Ref(grown), block=start)
    end, _ = recorded.add("control.end", Ref(start))
    assert recorded.add("control.final", Ref(end), Ref(carried))[1] is UNKNOWN
    assert recorded.add("control.collect", Ref(end), Ref(part))[1] is UNKNOWN


def test_empty_loop_is_not_looked_into(recorded):
    """The body of a loop without passes raises nothing, and gives nothing known."""
    hidden, _ = recorded.add("model.output", Ref(0), "0")
    numbers, _ = recorded.add("control.range", 0, 0, 1)
    start, _, _ = _loop(recorded, Ref(numbers))
    wrong, _ = recorded.add("operator.getitem", Ref(hidden), 99, block=start)
    end, _ = recorded.add("control.end", Ref(start))
    assert recorded.add("control.final", Ref(end), Ref(wrong))[1] is UNKNOWN


def test_containers(recorded):
    """Lists and dicts are known; a list that grows in a loop is not."""
    hidden, _ = recorded.add("model.output", Ref(0), "0")
    made, _ = recorded.add("container.list", Ref(hidden), 3)
    recorded.add("container.append", Ref(made), Ref(hidden))
    assert [getattr(item, "shape", item) for item in recorded.shadow.value(made)] == [(3, 8), 3, (3, 8)]
    named, _ = recorded.add("container.dict", a=Ref(hidden))
    assert recorded.add("operator.getitem", Ref(named), "a")[1].shape == (3, 8)
    start, item, _ = _loop(recorded, Ref(hidden))
    recorded.add("container.append", Ref(made), Ref(item), block=start)
    recorded.add("control.end", Ref(start))
    assert recorded.shadow.value(made) is UNKNOWN


@pytest.mark.parametrize("build", ["itself", "doubled"])
def test_containers_that_explode_are_refused(recorded, build):
    """A list that holds itself, or doubles thirty times, is refused before it is walked."""
    made, _ = recorded.add("container.list", 1, 2)
    with pytest.raises(ValueError, match="holds itself, more than"):
        for _ in range(30):
            if build == "itself":
                recorded.add("container.append", Ref(made), Ref(made))
            else:
                made, _ = recorded.add("container.list", Ref(made), Ref(made))


def test_change_of_what_is_kept_stays_in_its_trace():
    """A list that a module returns and a graph changes is as before in the next trace."""

    class Two(nn.Module):
        def forward(self, x):
            return [x, x + 1]

    module, tensors = nn.Sequential(Two()), {"x": torch.zeros(2, 3)}
    for _ in range(2):
        recorded = Recorded(module, tensors)
        output, value = recorded.add("model.output", Ref(0), "0")
        assert [item.shape for item in value] == [(2, 3), (2, 3)]
        recorded.add("operator.setitem", Ref(output), 0, 5)
    assert twin_of(module).runs == 1


_NET = _real_net()


@given(rows=st.integers(1, 6), index=st.integers(-8, 8), width=st.integers(1, 12))
def test_errors_are_those_of_a_run(rows, index, width):
    """For any index and width: the fake evaluation fails exactly when a run does, with the same type and words."""
    tensors = {"x": torch.zeros(rows, 6)}
    recorded = Recorded(_NET, tensors)
    hidden, _ = recorded.add("model.output", Ref(0), "0")
    fake = real = None
    try:
        row, _ = recorded.add("operator.getitem", Ref(hidden), index)
        other, _ = recorded.add("torch.zeros", width)
        recorded.add("operator.add", Ref(row), Ref(other))
    except ExecutionFailed as error:
        fake = type(error).__name__, error.what
    try:
        run_graph(recorded.builder.graph(), tensors, _NET)
    except ExecutionFailed as error:
        real = type(error).__name__, error.what
    assert fake == real
