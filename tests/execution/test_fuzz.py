"""Random valid graphs on real models: whatever they compute, the resident model stays as it is, and errors are ours."""

import contextlib

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import nn

from nnsight_hpc.execution import run_graph
from nnsight_hpc.execution.estimate import check_memory
from nnsight_hpc.execution.values import pack_values
from nnsight_hpc.graph import GraphBuilder, Ref, TensorRef, validate
from nnsight_hpc.graph.nodes import Seed
from nnsight_hpc.graph.operations import ALLOWED, ATTRIBUTES, FIELDS, IN_PLACE, PROTOCOL, RANDOM, VIEWS
from nnsight_hpc.wire.errors import HpcError, InvalidGraph
from nnsight_hpc.wire.messages import ModelIdentity
from tests.oracle.architectures import WIDTH, make

BUDGET = 1 << 30
EXAMPLES = [60, pytest.param(10_000, marks=pytest.mark.long)]


class Stateful(nn.Module):
    """Layers with statistics, a table that is no buffer, a shared weight, and a list: what a graph must not reach."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.last, self.plain, self.sizes = nn.Linear(4, 4, bias=False), torch.ones(4), [torch.zeros(4)]
        self.last.weight = self.first.weight
        self.register_buffer("table", torch.arange(4.0))

    def forward(self, value):
        table, plain, sizes = self.table, self.plain, self.sizes
        hidden = self.drop(self.norm(self.first(value)))
        return self.last(hidden * table + plain + sizes[0])


def _stateful():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Stateful().eval().requires_grad_(requires_grad=False)


_LLAMA = {
    "paths": [
        "",
        "model",
        "model.layers.0",
        "model.layers.1.mlp",
        "model.layers.0.self_attn",
        "model.rotary_emb",
        "lm_head",
    ],
    "operations": [
        *("model.layers.0.self_attn:attention_interface_0", "model.layers.1.mlp:self_down_proj_0"),
        *("model.rotary_emb:self_inv_freq_to_0", "model.layers.0:residual_0"),
    ],
    "weights": [
        ("model.embed_tokens", "weight"),
        ("model.layers.0.mlp.up_proj", "weight"),
        ("model.rotary_emb", "inv_freq"),
    ],
    "inputs": {"input_ids": TensorRef("x"), "use_cache": False},
    "tensors": {"x": torch.tensor([[3, 4, 5], [6, 7, 8]]), "y": torch.ones(2, 3, WIDTH), "n": torch.tensor(2)},
}
_STATEFUL = {
    "paths": ["", "first", "norm", "drop", "last"],
    "operations": [":table_0", ":plain_0", ":sizes_0", "norm:F_batch_norm_0", "drop:F_dropout_0", ":self_norm_0"],
    "weights": [("first", "weight"), ("last", "weight"), ("norm", "running_mean"), ("", "table")],
    "inputs": {"value": TensorRef("x")},
    "tensors": {"x": torch.ones(2, 4), "y": torch.ones(2, 4), "n": torch.tensor(2)},
}
MODELS = {"stateful": (_stateful, _STATEFUL), "llama": (lambda: make("llama").module, _LLAMA)}

_CHANGES = sorted(op for op in IN_PLACE if op.startswith("Tensor.") and op not in RANDOM)
_PLAIN = sorted(ALLOWED - PROTOCOL)
_ADDITIONS = ["operator.add", "operator.mul", "operator.getitem", "torch.cat", "torch.stack", "Tensor.sum"]
_scalars = st.sampled_from(
    [0, 1, 2, -1, 0.5, True, None, (0, 1), (2, -1), (), slice(0, 1, None), ..., "mean", "a b -> b a"]
)


class _Writer:
    """A graph under construction, one random step after another."""

    def __init__(self, draw, paths, operations, weights, inputs):
        self.builder, self._draw, self._block, self.saved = GraphBuilder(), draw, None, {}
        self._paths, self._places = st.sampled_from(paths), st.sampled_from(paths) | st.sampled_from(operations)
        forward = self._add("model.forward", **inputs)
        invokes = [self._add("model.invoke", forward, row, row + 1) for row in range(2) if draw(st.booleans())]
        self._wheres = [forward, *invokes]
        first = self._add("model.output", forward, draw(self._paths))
        self._values = [
            first,
            TensorRef("y"),
            TensorRef("n"),
            self._add("model.parameter", *draw(st.sampled_from(weights))),
        ]

    def _add(self, op, *args, **kwargs):
        return Ref(self.builder.append(op, args, kwargs, None, self._block))

    def _value(self):
        return self._draw(st.sampled_from(self._values))

    def node(self):
        return self._draw(st.sampled_from([value for value in self._values if isinstance(value, Ref)]))

    def _more(self, most):
        """Further arguments of an operation."""
        return [
            self._draw(_scalars) if self._draw(st.booleans()) else self._value()
            for _ in range(self._draw(st.integers(0, most)))
        ]

    def change(self):
        op = self._draw(
            st.sampled_from(_CHANGES) | st.sampled_from(["operator.iadd", "operator.imul", "operator.setitem"])
        )
        more = [..., self._value()] if op == "operator.setitem" else self._more(2)
        self._values.append(self._add(op, self.node(), *more))

    def compute(self):
        op = self._draw(st.sampled_from(_PLAIN) | st.sampled_from(_ADDITIONS))
        first = [self._value(), self._value()] if self._draw(st.integers(0, 3)) == 0 else self._value()
        self._values.append(self._add(op, first, *self._more(2), **({"generator": Seed(1)} if op in RANDOM else {})))

    def view(self):
        op = self._draw(st.sampled_from(sorted(VIEWS)))
        rest = [self._draw(st.sampled_from(sorted(ATTRIBUTES | FIELDS)))] if op == "attribute" else self._more(1)
        self._values.append(self._add(op, self.node(), *rest))

    def read(self):
        op = self._draw(st.sampled_from(["model.input", "model.inputs", "model.output"]))
        self._values.append(
            self._add(op, self._draw(st.sampled_from(self._wheres)), self._draw(self._places), optional=True)
        )

    def put(self):
        op = self._draw(st.sampled_from(["model.set_input", "model.set_output", "model.skip"]))
        self._add(op, self._draw(st.sampled_from(self._wheres)), self._draw(self._places), self._value(), optional=True)

    def hold(self):
        one, other = self._value(), self._value()
        as_dict = self._draw(st.booleans())
        self._values.append(
            self._add("container.dict", a=one, b=other) if as_dict else self._add("container.list", one, other)
        )

    def call(self):
        self._values.append(self._add("model.call", self._draw(self._paths), self._value()))

    def loop(self):
        loop = self._add("control.loop", self._draw(st.sampled_from([[1, 2], [3]])))
        self._block = loop.id
        inside = self._add("operator.pos", self.node())
        changed = self._add(self._draw(st.sampled_from(_CHANGES)), inside, *self._more(1))
        self._block = None
        out = self._draw(st.sampled_from(["control.final", "control.collect"]))
        self._values.append(
            self._add(out, self._add("control.end", loop), self._draw(st.sampled_from([inside, changed])))
        )

    def save(self, value):
        self.saved[f"s{len(self.saved)}"] = self._add("save", value).id

    def gradient(self):
        self.save(self._add("grad.read", self._values[0]))
        self._add("grad.backward", self._add("torch.sum", self.node()))


_STEPS = ("change", "change", "compute", "compute", "view", "read", "put", "hold", "call", "loop")


@st.composite
def programs(draw, paths, operations, weights, inputs, **_):
    """A graph of some steps: points read, set and skipped, weights, constants, blocks, gradients; nearly always a valid one."""
    writer = _Writer(draw, paths, operations, weights, inputs)
    for step in draw(st.lists(st.sampled_from(_STEPS), min_size=2, max_size=9)):
        getattr(writer, step)()
        if draw(st.booleans()):
            writer.save(writer.node())
    if draw(st.integers(0, 3)) == 0:
        writer.gradient()
    return writer.builder.build(writer.saved, ModelIdentity(id="m"))


def _resident(module):
    """Every tensor that a model holds, and how it is seen; the tensors themselves are copied."""
    plain = [
        value
        for part in module.modules()
        for entry in vars(part).values()
        for value in (entry if isinstance(entry, list) else [entry])
        if isinstance(value, torch.Tensor)
    ]
    return [
        (
            id(t),
            t.data_ptr(),
            t.shape,
            t.stride(),
            t.dtype,
            t.requires_grad,
            t.grad,
            t._backward_hooks,
            t.detach().clone(),
        )
        for t in (*module.parameters(), *module.buffers(), *plain)
    ]


def _same(before, after):
    return all(a[:-1] == b[:-1] and torch.equal(a[-1], b[-1]) for a, b in zip(before, after, strict=True))


def _overwrite(value):
    """Write into everything that was returned."""
    if isinstance(value, torch.Tensor):
        with contextlib.suppress(RuntimeError):  # an expanded tensor cannot be written into
            value.detach().zero_()
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            _overwrite(item)


def _outcome(graph, tensors, module):
    """As a worker does it: refused, or run under the guard, and its values packed and then written into."""
    try:
        validate(graph)
    except InvalidGraph:
        return "refused"
    given = {name: tensor.clone() for name, tensor in tensors.items()}
    try:
        guard = None
        with contextlib.suppress(HpcError):
            guard = check_memory(graph, given, module, BUDGET)
        values = run_graph(graph, given, module, guard=guard, cancelled=lambda: False)
        pack_values(values)
    except HpcError:
        return "failed"
    finally:
        assert all(torch.equal(given[name], tensors[name]) for name in tensors), "a constant was changed"
    _overwrite(values)
    return "ran"


@pytest.mark.filterwarnings("ignore")  # operations warn of odd arguments
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("name", MODELS)
def test_random_program_changes_nothing(name, examples):
    """Parameters, buffers and plain tensors of a model keep their values, memory and form; every error is of our kinds."""
    made, described = MODELS[name]
    module = made()
    before, outcomes = _resident(module), {"refused": 0, "failed": 0, "ran": 0}
    rng = torch.get_rng_state()

    @seed(20261122)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(programs(**described))
    def tried(graph):
        outcomes[_outcome(graph, described["tensors"], module)] += 1
        assert _same(before, _resident(module)), "the model was changed"
        assert torch.equal(torch.get_rng_state(), rng), "the process's random numbers were drawn"

    tried()
    assert outcomes["refused"] < examples / 2, outcomes
