"""Graphs that pass as documents and would do harm when they run: each is an error that names the operation, or runs harmlessly.

What is tried: to change the resident model, to hold much more memory than goes in, to compute for ever, to reach objects
behind values.
"""

import contextlib

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn

from nnsight_hpc.execution import run_graph
from nnsight_hpc.execution.memory import memory_of
from nnsight_hpc.graph import DType, GraphBuilder, Ref, TensorRef, validate
from nnsight_hpc.wire.errors import HpcError, InvalidGraph
from nnsight_hpc.wire.messages import ModelIdentity
from tests.graph.random_graphs import graphs, programs


class Exposed(nn.Module):
    """A linear layer whose weight a graph would like to change."""

    def __init__(self):
        super().__init__()
        self.fc, self.same, self.calls = nn.Linear(6, 6), nn.Identity(), 0

    def forward(self, v):
        self.calls += 1
        return self.same(self.fc(v))


@pytest.fixture
def exposed():
    torch.manual_seed(0)
    return Exposed().requires_grad_(False)


def _run(module, *nodes, save=None):
    """Run a graph of a forward and `nodes`, each ``(op, *args)`` with keywords in a last dict; a block is its keyword."""
    builder = GraphBuilder()
    builder.add("model.forward", TensorRef("x"))
    for op, *args in nodes:
        kwargs = args.pop() if args and type(args[-1]) is dict else {}
        builder.add(op, *args, **kwargs)
    saves = {} if save is None else {"saved": builder.add("save", Ref(save))}
    return run_graph(builder.build(saves, ModelIdentity(id="m")), {"x": torch.ones(2, 6)}, module)


WEIGHT = ("model.parameter", "fc", "weight")  # node 1
# What is node 1's weight, or may be, under another name; the last node is changed in place.
DISGUISES = {
    "a list and another": (("container.list", Ref(1)), ("operator.add", Ref(2), [1]), ("operator.getitem", Ref(3), 0)),
    "a list, repeated": (("container.list", Ref(1)), ("operator.mul", Ref(2), 2), ("operator.getitem", Ref(3), 1)),
    "a list, extended": (
        ("container.list",),
        ("container.list", Ref(1)),
        ("operator.iadd", Ref(2), Ref(3)),
        ("operator.getitem", Ref(2), 0),
    ),
    "a list, extended by a constant list": (
        ("container.list",),
        ("operator.iadd", Ref(2), [Ref(1)]),
        ("operator.getitem", Ref(2), 0),
    ),
    "a list in a list": (
        ("container.list", Ref(1)),
        ("container.list", Ref(2)),
        ("operator.getitem", Ref(3), 0),
        ("operator.getitem", Ref(4), 0),
    ),
    "an entry of a dict in a list": (
        ("container.dict",),
        ("container.list", Ref(2)),
        ("operator.getitem", Ref(3), 0),
        ("operator.setitem", Ref(4), "k", Ref(1)),
        ("operator.getitem", Ref(2), "k"),
    ),
    "an entry of a list": (
        ("container.list", 0),
        ("operator.setitem", Ref(2), 0, Ref(1)),
        ("operator.getitem", Ref(2), 0),
    ),
    "two dicts": (
        ("container.dict", {"a": Ref(1)}),
        ("container.dict", {"b": 1}),
        ("operator.or_", Ref(2), Ref(3)),
        ("operator.getitem", Ref(4), "a"),
    ),
    "a dict, updated": (
        ("container.dict", {"b": 1}),
        ("container.dict", {"a": Ref(1)}),
        ("operator.ior", Ref(2), Ref(3)),
        ("operator.getitem", Ref(2), "a"),
    ),
    "appended": (
        ("container.list",),
        ("container.append", Ref(2), Ref(1)),
        ("operator.getitem", Ref(2), 0),
    ),
    "keywords of a module": (
        ("model.inputs", Ref(0), "same"),
        ("operator.getitem", Ref(2), 1),
        ("operator.setitem", Ref(3), "k", Ref(1)),
        ("operator.getitem", Ref(3), "k"),
    ),
    "broadcast": (("torch.broadcast_tensors", Ref(1), 1.0), ("operator.getitem", Ref(2), 0)),
    "packed": (("einops.pack", [Ref(1)], "* b"), ("operator.getitem", Ref(2), 0)),
    "converted": (("torch.as_tensor", Ref(1)),),
    "typed": (("Tensor.type", Ref(1), DType("float32")),),
    "merged": (
        ("control.if", True),
        ("operator.pos", Ref(1), {"block": 2}),
        ("control.merge", Ref(2), Ref(3), 0),
    ),
    "item of a loop": (
        ("container.list", Ref(1)),
        ("control.loop", Ref(2)),
        ("control.item", Ref(3), {"block": 3}),
        ("control.end", Ref(3)),
        ("control.final", Ref(5), Ref(4)),
    ),
    "variable of a loop": (
        ("control.range", 1),
        ("control.loop", Ref(2)),
        ("control.carried", Ref(3), Ref(1), {"block": 3}),
        ("control.end", Ref(3)),
        ("control.final", Ref(5), Ref(4)),
    ),
    "collected": (
        ("control.range", 1),
        ("control.loop", Ref(2)),
        ("operator.pos", Ref(1), {"block": 3}),
        ("control.end", Ref(3)),
        ("control.collect", Ref(5), Ref(4)),
        ("operator.getitem", Ref(6), 0),
    ),
    "output of a call": (("model.call", "same", Ref(1)),),
    "transposed attribute": (("attribute", Ref(1), "mT"),),
}


@pytest.mark.parametrize("change", ["Tensor.zero_", "Tensor.requires_grad_", "operator.setitem"])
@pytest.mark.parametrize("disguise", DISGUISES.values(), ids=DISGUISES.keys())
def test_weight_under_another_name_is_not_changed(exposed, disguise, change):
    """Whatever a graph wraps a weight in, the resident model stays as it is: the change is refused, or made to a copy."""
    before = exposed.fc.weight.clone()
    rest = (..., 5.0) if change == "operator.setitem" else ()
    with contextlib.suppress(HpcError):
        _run(exposed, WEIGHT, *disguise, (change, Ref(len(disguise) + 1), *rest))
    assert torch.equal(exposed.fc.weight, before)
    assert not exposed.fc.weight.requires_grad


@pytest.mark.parametrize("disguise", DISGUISES.values(), ids=DISGUISES.keys())
def test_saved_weight_under_another_name_is_a_copy(exposed, disguise):
    """Whoever writes into what a run returned does not write into the resident model."""
    before, results = exposed.fc.weight.clone(), {}
    with contextlib.suppress(HpcError):
        results = _run(exposed, WEIGHT, *disguise, save=len(disguise) + 1)
    for tensor in results.values():
        tensor.zero_()
    assert torch.equal(exposed.fc.weight, before)


HUGE = {
    "tower of powers": ("OverflowError", ("operator.pow", 9, 9), ("operator.pow", 9, Ref(1))),
    "shift": ("OverflowError", ("operator.lshift", 1, 2**40)),
    "product": ("OverflowError", ("operator.mul", 2**40, 2**40)),
    "text": ("ValueError", ("operator.mul", "a", 2**40)),
    "format": ("TypeError", ("operator.mod", "%1000000000d", 1)),
    "format of a tensor": ("TypeError", ("operator.mod", "%1000000000d", TensorRef("x"))),
    "list": ("ValueError", ("operator.mul", [0], 2**40)),
    "list by a tensor": ("TypeError", ("torch.tensor", 2**40), ("operator.mul", [0], Ref(1))),
    "list and a range": ("TypeError", ("control.range", 10**6), ("container.list",), ("operator.iadd", Ref(2), Ref(1))),
    "numbers of a view": ("ValueError", ("Tensor.expand", TensorRef("x"), 2**30, 2, 6), ("Tensor.tolist", Ref(1))),
    "rows of a view": ("ValueError", ("Tensor.expand", TensorRef("x"), 2**30, 2, 6), ("Tensor.unbind", Ref(1))),
    "pieces of a view": ("ValueError", ("Tensor.expand", TensorRef("x"), 2**30, 2, 6), ("torch.split", Ref(1), 1)),
    "sections": ("ValueError", ("torch.tensor_split", TensorRef("x"), 2**40)),
    "passes over a view": (
        "ValueError",
        ("Tensor.expand", TensorRef("x"), 2**30, 2, 6),
        ("control.loop", Ref(1)),
        ("control.end", Ref(2)),
    ),
    "passes over a range": ("ValueError", ("control.range", 2**40), ("control.loop", Ref(1)), ("control.end", Ref(2))),
    "tensor of a range": ("ValueError", ("control.range", 2**40), ("torch.tensor", Ref(1))),
}
DOUBLING = (
    ("control.range", 60),
    ("control.loop", Ref(1)),
    ("control.carried", Ref(2), [1], {"block": 2}),
    ("container.list", Ref(3), Ref(3), {"block": 2}),
    ("control.next", Ref(3), Ref(4), {"block": 2}),
    ("control.end", Ref(2)),
    ("control.final", Ref(6), Ref(3)),
)
USES = {
    "saved": (),
    "logged": (("log", Ref(7)),),
    "compared": (("operator.eq", Ref(7), [Ref(7)]),),
    "extended": (("operator.add", Ref(7), [1]),),
    "held": (("container.list", 1), ("operator.setitem", Ref(8), 0, Ref(7))),
    "given to a function": (("torch.tensor", Ref(7)),),
    "given to a module": (("model.call", "same", Ref(7)),),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("kind", "nodes"), [(kind, nodes) for kind, *nodes in HUGE.values()], ids=HUGE.keys())
def test_what_grows_beyond_its_arguments_is_an_error(exposed, kind, nodes):
    """Numbers, text, lists and loops that would fill memory, or take for ever, raise at once, at their operation."""
    with pytest.raises(HpcError) as caught:
        _run(exposed, *nodes)
    assert kind in str(caught.value)
    assert any(op in str(caught.value) for op, *_ in nodes)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_list_that_holds_itself_twice_over_and_over_is_refused(exposed, use):
    """A list of 2 ** 60 entries that share their memory is not saved, printed, compared or changed."""
    nodes = (*DOUBLING, *use)
    with pytest.raises(HpcError, match=r"limit|entries"):
        _run(exposed, *nodes, save=None if use else len(nodes))


REACHING = {
    "attribute of a module's output": ("model.output", Ref(0), "", "numel"),
    "method as an attribute": ("model.output", Ref(0), "", "sum"),
    "gradient function": ("model.output", Ref(0), "", "grad_fn"),
}


@pytest.mark.parametrize(("op", "where", "path", "name"), REACHING.values(), ids=REACHING.keys())
def test_nothing_but_listed_attributes_is_reached(exposed, op, where, path, name):
    """An attribute that is not on the list is an error that says so, also where the graph cannot know the value's type."""
    with pytest.raises(HpcError, match=f"'{name}'"):
        _run(exposed, (op, where, path), ("attribute", Ref(1), name))


def _outcome(graph, module):
    """What a run returns, or the error that it is, and whether the graph was refused as a document."""
    try:
        validate(graph)
    except InvalidGraph as error:
        with pytest.raises(InvalidGraph):
            run_graph(graph, {"x": torch.ones(2, 6)}, module)
        return error, True
    try:
        return run_graph(graph, {"x": torch.ones(2, 6)}, module, log=lambda _line, _source: None), False
    except HpcError as error:
        return error, False


_same_module = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@_same_module
@given(graph=graphs())
def test_refused_graph_never_calls_the_model(exposed, graph):
    """A random graph that the validator refuses does not run; one that it takes gives its values, or an error of ours."""
    exposed.calls = 0
    outcome, refused = _outcome(graph, exposed)
    assert not (refused and exposed.calls)
    assert isinstance(outcome, HpcError) or set(outcome) == set(graph.saves)


@pytest.mark.filterwarnings("ignore")  # operations warn of odd arguments
@_same_module
@given(graph=programs())
def test_random_program_runs_or_fails_at_a_node_and_changes_nothing(exposed, graph):
    """A random program gives values that are not the model's weights, or an error that names an operation; weights stay."""
    before = exposed.fc.weight.clone()
    outcome, _ = _outcome(graph, exposed)
    if isinstance(outcome, HpcError):
        assert any(node.op in str(outcome) for node in graph.nodes), outcome
    else:
        assert set(outcome) == set(graph.saves)
        assert not memory_of([*outcome.values()]) & memory_of([*exposed.parameters()])
    assert torch.equal(exposed.fc.weight, before)
