"""Random programs on a real model: those that set nothing, as far as `accesses` tells, change nothing in the model."""

import contextlib

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from nnsight_hpc.execution import run_graph
from nnsight_hpc.graph import GraphBuilder, Ref, TensorRef, validate
from nnsight_hpc.graph.access import accesses
from nnsight_hpc.wire.errors import HpcError
from nnsight_hpc.wire.messages import ModelIdentity
from tests.oracle.architectures import make

IDS = torch.tensor([[3, 4, 5], [6, 7, 8]])
POINTS = [
    *[("model.output", path) for path in ("model.layers.0", "model.layers.0.mlp", "model.layers.1", "lm_head")],
    *[("model.input", path) for path in ("model.layers.0", "model.layers.1.mlp", "model.norm")],
    *[("model.output", "model.layers.0.mlp:self_down_proj_0"), ("model.output", "model.layers.1:residual_0")],
]
VIEWS = [
    *[
        ("Tensor.detach",),
        ("Tensor.contiguous",),
        ("Tensor.float",),
        ("operator.getitem", ...),
        ("Tensor.unsqueeze", 0),
    ],
    *[("operator.getitem", 0), ("torch.flatten",), ("torch.squeeze",), ("attribute", "T"), ("Tensor.to", "cpu")],
]
COPIES = [("Tensor.clone",), ("torch.relu",), ("operator.mul", 2), ("torch.cos",)]
CHANGES = [
    ("Tensor.mul_", 3),
    ("Tensor.zero_",),
    ("operator.iadd", 1),
    ("operator.setitem", ..., 7.0),
    ("Tensor.neg_",),
]


class Writer:
    """A program that reads the model, and goes on with what it has read: as views or copies, in lists, blocks and loops."""

    def __init__(self, draw):
        self.builder, self._draw, self._block = GraphBuilder(), draw, None
        self.forward = self._add("model.forward", input_ids=TensorRef("x"), use_cache=False)
        self._tensors, self._lists = [], []
        self.read()

    def _add(self, op, *args, **kwargs):
        return Ref(self.builder.append(op, args, kwargs, None, self._block))

    def _one(self, values):
        return self._draw(st.sampled_from(values))

    def _through(self, table, value):
        op, *args = self._one(table)
        return self._add(op, value, *args)

    def read(self):
        op, path = self._one(POINTS)
        self._tensors.append(self._add(op, self.forward, path))

    def view(self):
        self._tensors.append(self._through(VIEWS, self._one(self._tensors)))

    def copy(self):
        self._tensors.append(self._through(COPIES, self._one(self._tensors)))

    def change(self):
        self._tensors.append(self._through(CHANGES, self._one(self._tensors)))

    def hold(self):
        self._lists.append(self._add("container.list", self._one(self._tensors), self._one(self._tensors)))

    def append(self):
        if self._lists:
            self._lists.append(self._add("container.append", self._one(self._lists), self._one(self._tensors)))

    def take(self):
        if self._lists:
            self._tensors.append(self._add("operator.getitem", self._one(self._lists), self._draw(st.integers(0, 1))))

    def branch(self):
        value, other = self._one(self._tensors), self._one(self._tensors)
        condition = self._add("control.if", self._draw(st.booleans()))
        self._block = condition.id
        inside = self._through(self._one([VIEWS, COPIES, CHANGES]), value)
        self._block = None
        self._tensors.append(self._add("control.merge", condition, inside, other))

    def loop(self):
        over, start = self._one(self._tensors + self._lists), self._one(self._tensors)
        loop = self._add("control.loop", over)
        self._block = loop.id
        item = self._add("control.item", loop)
        carried = self._add("control.carried", loop, start)
        made = self._through(self._one([VIEWS, COPIES, CHANGES]), self._one([item, carried, start]))
        self._add("control.next", carried, made)
        self._block = None
        end = self._add("control.end", loop)
        self._tensors.append(self._add("control.final", end, self._one([made, item, carried])))
        self._lists.append(self._add("control.collect", end, made))


@st.composite
def programs(draw):
    """A graph of some steps; at the end, what the model returned is saved as ``output``."""
    writer = Writer(draw)
    steps = ("read", "view", "view", "copy", "change", "hold", "append", "take", "branch", "loop")
    for step in draw(st.lists(st.sampled_from(steps), min_size=1, max_size=7)):
        getattr(writer, step)()
    output = writer.builder.add("save", Ref(writer.builder.add("model.output", writer.forward, "")))
    return writer.builder.build({"output": output}, ModelIdentity(id="m"))


@pytest.mark.filterwarnings("ignore")  # operations warn of odd arguments
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("examples", [150, pytest.param(10_000, marks=pytest.mark.long)])
def test_a_program_that_sets_nothing_changes_nothing(examples):
    """Whoever changes a value in place that the model goes on with is found out, through views, lists, blocks and loops."""
    module, outcomes = make("llama").module, {"changed": 0, "allowed": 0, "refused in vain": 0}
    plain = module(input_ids=IDS, use_cache=False).logits

    @seed(0)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(programs())
    def check(graph):
        with contextlib.suppress(HpcError):  # shapes that do not fit, values that come too late
            validate(graph)
            output = run_graph(graph, {"x": IDS}, module)["output"]["logits"]
            sets = any(access.right == "set" and access.modules for access in accesses(graph))
            same = torch.equal(output, plain)
            assert sets or same, graph
            outcomes["changed" if not same else "refused in vain" if sets else "allowed"] += 1

    check()
    assert min(outcomes["changed"], outcomes["allowed"]) > examples // 10, outcomes
    assert outcomes["refused in vain"] < examples // 3, outcomes
