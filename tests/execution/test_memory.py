"""The resident model stays as it is, whatever a graph does; so do the constants of the graph."""

import inspect

import pytest
import torch
from torch import nn

from nnsight_hpc.execution import run_graph
from nnsight_hpc.execution.resolve import function_of
from nnsight_hpc.graph import GraphBuilder, Ref, TensorRef
from nnsight_hpc.graph.operations import ALLOWED, DENIED_KEYWORDS, IN_PLACE, MOST_POSITIONAL, PROTOCOL, VIEWS
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


@pytest.mark.parametrize("op", sorted(ALLOWED - PROTOCOL))
def test_positional_arguments_end_before_the_denied_ones(op):
    """Where torch takes by position what is denied as a keyword, so many positional arguments are refused."""
    try:
        names = list(inspect.signature(function_of(op)).parameters.values())
    except ValueError:
        return  # a builtin of torch: what it writes to, it takes by keyword only
    by_position = [p.name for p in names if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    denied = [index for index, name in enumerate(by_position) if name in DENIED_KEYWORDS]
    assert MOST_POSITIONAL.get(op) == min(denied, default=None)


@pytest.mark.filterwarnings("ignore")  # operations warn of odd arguments
@pytest.mark.parametrize("op", sorted(ALLOWED - PROTOCOL - VIEWS - IN_PLACE))
def test_what_is_no_view_gives_new_memory(op):
    """Operations that are not on the list of views share no memory with a tensor that they are given."""
    for tensor in (torch.rand(4, 4), torch.rand(4), torch.rand(()), torch.ones(4, 4, dtype=torch.int64)):
        for args in ((tensor,), ([tensor],), (tensor, 0), (tensor, 1), (tensor, 1.0), (tensor, tensor), (tensor, ())):
            if len(args) > MOST_POSITIONAL.get(op, len(args)):
                continue
            try:
                result = function_of(op)(*args)
            except Exception:  # noqa: BLE001 - not every operation takes these
                continue
            if isinstance(result, torch.Tensor) and result.numel():
                assert result.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()
