"""The resident model stays as it is, whatever a graph does; so do the constants of the graph."""

import inspect

import pytest
import torch
from torch import nn

from nnsight_hpc.execution import run_graph
from nnsight_hpc.execution.resolve import function_of
from nnsight_hpc.graph import GraphBuilder, Ref, TensorRef
from nnsight_hpc.graph.build import COLLECT, DICT, END, FINAL, FORWARD, LIST, LOOP, PARAMETER, RANGE
from nnsight_hpc.graph.operations import ALLOWED, DENIED_KEYWORDS, MOST_POSITIONAL, PROTOCOL
from nnsight_hpc.wire.errors import InvalidGraph
from nnsight_hpc.wire.messages import ModelIdentity


class Exposed(nn.Module):
    """Modules that hand out a weight, are given one, and write in place."""

    def __init__(self):
        super().__init__()
        self.fc, self.act, self.same = nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Identity()
        self.register_buffer("table", torch.randn(6, 6))

    def forward(self, v):
        return self.act(self.fc(v)) @ self.same(self.table)


@pytest.fixture
def exposed():
    torch.manual_seed(0)
    return Exposed().requires_grad_(False)


def _run(module, x, *nodes):
    """Run a graph of a forward and `nodes`, and return which weights differ afterwards, and the refusal if there was one."""
    before = {name: value.clone() for name, value in module.state_dict().items()}
    builder = GraphBuilder()
    builder.add("model.forward", TensorRef("x"))
    for op, *args in nodes:
        builder.add(op, *args)
    refusal = None
    try:
        run_graph(builder.build({}, ModelIdentity(id="m")), {"x": x}, module)
    except InvalidGraph as error:
        refusal = error
    return [name for name, value in module.state_dict().items() if not torch.equal(value, before[name])], refusal


WEIGHT = ("model.parameter", "fc", "weight")
VIEWED = {
    "itself": ("operator.pos", Ref(1)),
    "einsum": ("torch.einsum", "ij->ji", Ref(1)),
    "diagonal": ("torch.linalg.diagonal", Ref(1)),
    "einops": ("einops.reduce", Ref(1), "a b -> a b", "sum"),
    "call": ("operator.getitem", Ref(1), 0),
}


@pytest.mark.parametrize("view", VIEWED.values(), ids=VIEWED.keys())
def test_view_of_a_weight_cannot_be_changed(exposed, x, view):
    """A change of what may be a view of a parameter is refused."""
    changed, refusal = _run(exposed, x, WEIGHT, view, ("Tensor.zero_", Ref(2)))
    assert changed == []
    assert "would change a parameter" in str(refusal)


@pytest.mark.parametrize("kind", ["input", "output"])
def test_weight_that_stands_at_a_point_cannot_be_changed(exposed, x, kind):
    """A module that is given a weight, or hands one out, does not open it to changes in place."""
    changed, refusal = _run(exposed, x, (f"model.{kind}", Ref(0), "same"), ("operator.setitem", Ref(1), 0, 5.0))
    assert changed == []
    assert "would change a parameter" in str(refusal)


PASSED = {
    "call": ("model.call", "act", Ref(1)),
    "output": ("model.set_output", Ref(0), "fc", Ref(1)),
    "inputs": ("model.set_inputs", Ref(0), "act", ((Ref(1),), {})),
    "forward": ("model.forward", Ref(1)),
}


@pytest.mark.parametrize("node", PASSED.values(), ids=PASSED.keys())
def test_module_that_writes_in_place_gets_a_copy_of_a_weight(exposed, x, node):
    """A weight that the graph hands to the model is a copy there."""
    changed, refusal = _run(exposed, x, WEIGHT, node, ("model.output", Ref(0), ""))
    assert changed == []
    assert refusal is None


def test_constants_stay_as_they_were(x):
    """A model that writes into its input changes neither the caller's tensor nor the same constant elsewhere."""
    net, before = nn.Sequential(nn.ReLU(inplace=True)), x.clone()
    builder = GraphBuilder()
    first, second = (builder.add("model.forward", TensorRef("x")) for _ in range(2))
    saves = {f"o{f}": builder.add("save", Ref(builder.add("model.input", Ref(f), "0"))) for f in (first, second)}
    got = run_graph(builder.build(saves, ModelIdentity(id="m")), {"x": x}, net)
    assert torch.equal(got["o0"], before)
    assert torch.equal(got["o1"], before)
    assert torch.equal(x, before)


def test_saved_weight_is_a_copy(exposed, x):
    """Changing a saved parameter after the run does not change the model."""
    before = exposed.fc.weight.clone()
    builder = GraphBuilder()
    saved = builder.add("save", Ref(builder.add(*WEIGHT)))
    run_graph(builder.build({"w": saved}, ModelIdentity(id="m")), {"x": x}, exposed)["w"].zero_()
    assert torch.equal(exposed.fc.weight, before)


def _most_positional(op):
    """How many arguments torch takes by position before the first of those that are denied as keywords."""
    try:
        names = list(inspect.signature(function_of(op)).parameters.values())
    except ValueError:
        return MOST_POSITIONAL.get(op)  # a builtin of torch: what it writes to, it takes by keyword only
    by_position = [p.name for p in names if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return min((index for index, name in enumerate(by_position) if name in DENIED_KEYWORDS), default=None)


def test_positional_arguments_end_before_the_denied_ones():
    """Where torch takes by position what is denied as a keyword, so many positional arguments are refused."""
    expected = {op: _most_positional(op) for op in ALLOWED - PROTOCOL}
    assert expected == {op: MOST_POSITIONAL.get(op) for op in expected}


def _weights(net):
    return [tensor.clone() for tensor in net.state_dict().values()]


def test_weight_in_a_dict_under_the_name_of_a_fact(net, x, builder):
    """An entry called ``shape`` is the entry, not a fact about a tensor; the weight in it cannot be changed."""
    entries = builder.add(DICT, shape=Ref(builder.add(PARAMETER, "0", "weight")))
    builder.add("Tensor.add_", Ref(builder.add("attribute", Ref(entries), "shape")), 1.0)
    before = _weights(net)
    with pytest.raises(InvalidGraph, match="would change a parameter"):
        run_graph(builder.graph(), {"x": x}, net)
    assert all(map(torch.equal, before, net.state_dict().values()))


@pytest.mark.parametrize("handed_out", [FINAL, COLLECT])
def test_weight_that_a_loop_hands_out(net, x, builder, handed_out):
    """A parameter that is read in a loop is the model's outside of the loop, too."""
    loop = builder.add(LOOP, Ref(builder.add(RANGE, 1)))
    weight = builder.add(PARAMETER, "0", "weight", block=loop)
    value = builder.add(handed_out, Ref(builder.add(END, Ref(loop))), Ref(weight))
    if handed_out == COLLECT:
        value = builder.add("operator.getitem", Ref(value), 0)
    save = builder.add("save", Ref(value))
    before = _weights(net)
    got = run_graph(builder.graph(s=save), {"x": x}, net)["s"]
    assert got.data_ptr() != net[0].weight.data_ptr()
    builder.add("Tensor.add_", Ref(value), 1.0)
    with pytest.raises(InvalidGraph, match="would change a parameter"):
        run_graph(builder.graph(), {"x": x}, net)
    assert all(map(torch.equal, before, net.state_dict().values()))


def test_weight_in_a_list_that_a_module_writes_into(x, builder):
    """A module that is given a list with a weight in it gets a copy of the weight."""

    class Writes(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(2), requires_grad=False)

        def forward(self, entries):
            return entries[0].add_(1) if isinstance(entries, list) else entries

    model = Writes()
    entries = builder.add(LIST, Ref(builder.add(PARAMETER, "", "weight")))
    other = builder.add(FORWARD, Ref(entries))
    save = builder.add("save", Ref(builder.add("model.output", Ref(other), "")))
    assert torch.equal(run_graph(builder.graph(s=save), {"x": x}, model)["s"], torch.ones(2))
    assert torch.equal(model.weight, torch.zeros(2))


def test_switch_inside_of_a_forward_cannot_be_thrown(x, builder):
    """What decides how a module runs, such as whether batch statistics are updated, is not data."""
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(x.shape[1])).eval().requires_grad_(requires_grad=False)
    builder.add("model.set_output", Ref(0), "0:bn_training_1", True)
    builder.add("save", Ref(builder.add("model.output", Ref(0), "0")))
    before = _weights(model)
    with pytest.raises(InvalidGraph, match="a bool cannot be set"):
        run_graph(builder.graph(), {"x": x}, model)
    assert all(map(torch.equal, before, model.state_dict().values()))
