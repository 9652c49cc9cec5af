"""A run that is interrupted at any line of our own code leaves no hook, no changed forward, weight or mode behind."""

import itertools
import random
import sys
from pathlib import Path

import pytest
import torch

import nnsight_hpc.execution
from nnsight_hpc.execution import run_graph
from nnsight_hpc.graph import GraphBuilder, Ref, TensorRef
from nnsight_hpc.wire.errors import RequestCancelled
from nnsight_hpc.wire.messages import ModelIdentity
from tests.oracle.architectures import make

OURS = str(Path(nnsight_hpc.execution.__file__).parent)
INTERRUPTS = [20, pytest.param(400, marks=pytest.mark.long)]
"""Of each kind and error; each is a run of some milliseconds."""


class _Scenario(GraphBuilder):
    """A graph with one forward, or one generation, of the small Llama."""

    def __init__(self, op="model.forward", **kwargs):
        super().__init__()
        self.saved = {}
        self.forward = Ref(self.append(op, (), {"input_ids": TensorRef("ids"), **kwargs}, None))

    def at(self, kind, path, *values, where=None, **kwargs):
        return Ref(self.append(f"model.{kind}", (where or self.forward, path, *values), kwargs, None))

    def op(self, name, *args, **kwargs):
        return Ref(self.append(name, args, kwargs, None))

    def save(self, value):
        self.saved[f"s{len(self.saved)}"] = self.op("save", value).id

    def graph(self):
        return self.build(self.saved, ModelIdentity(id="m"))


def _points(s):
    s.save(s.at("input", "model.layers.0.mlp"))
    s.at("set_output", "model.layers.1", s.op("operator.mul", s.at("output", "model.layers.1"), 2.0))
    s.save(s.at("output", "lm_head"))
    s.save(s.op("model.result", s.forward))


def _source(s):
    value = s.at("output", "model.layers.0.self_attn:attention_interface_0")
    s.save(value)
    s.at("set_input", "model.layers.1.mlp:self_down_proj_0", s.at("input", "model.layers.1.mlp:self_down_proj_0"))
    s.save(s.at("output", "model.layers.2"))


def _gradients(s):
    value = s.at("output", "model.layers.1")
    s.save(s.op("grad.read", value))
    s.op("grad.set", value, s.op("torch.zeros_like", value))
    s.op("grad.backward", s.op("torch.sum", s.at("output", "lm_head")))


def _skip(s):
    s.at("skip", "model.layers.1", s.at("output", "model.layers.0"))
    s.save(s.at("output", "lm_head"))


def _cache(s):
    for layer in range(4):
        s.save(s.at("output", f"model.layers.{layer}.mlp", optional=True))
        s.save(s.at("inputs", f"model.layers.{layer}", optional=True))


def _invokes(s):
    for start in (0, 1):
        part = s.op("model.invoke", s.forward, start, start + 1)
        value = s.at("output", "model.layers.1", where=part)
        s.op("Tensor.mul_", value, 2.0)
        s.save(s.at("output", "lm_head", where=part))


def _call(s):
    s.save(s.op("model.call", "model.norm", s.at("output", "model.layers.1")))
    s.save(s.at("output", "lm_head"))


SCENARIOS = {f.__name__.strip("_"): f for f in (_points, _source, _gradients, _skip, _cache, _invokes, _call)}
GENERATED = {"generation": _points, "invokes in a generation": _invokes}


def _graph(kind):
    generated = {"max_new_tokens": 2, "do_sample": True, "seed": 3} if kind in GENERATED else {}
    scenario = _Scenario("model.generate" if generated else "model.forward", **generated)
    (SCENARIOS | GENERATED)[kind](scenario)
    return scenario.graph()


class _Tracer:
    """Counts the lines of our own code that are run, and raises at one of them."""

    def __init__(self, error=None, at=0):
        self.lines, self._error, self._at = 0, error, at

    def __call__(self, frame, _event, _arg):
        return self._line if frame.f_code.co_filename.startswith(OURS) else None

    def _line(self, _frame, event, _arg):
        if event == "line":
            self.lines += 1
            if self.lines == self._at:
                sys.settrace(None)
                raise self._error
        return self._line


def _traced(graph, tensors, module, tracer):
    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        run_graph(graph, tensors, module, cancelled=lambda: False)
    finally:
        sys.settrace(before)


def _left(module):
    """All that an interrupted run might leave changed."""
    parts = {
        name: (
            list(vars(part)),
            [len(table) for table in vars(part).values() if isinstance(table, dict)],
            part.training,
        )
        for name, part in module.named_modules()
    }
    own = {name: vars(part).get("forward") for name, part in module.named_modules()}
    tensors = [
        (t.data_ptr(), t._version, t.requires_grad, t.grad, t._backward_hooks)
        for t in (*module.parameters(), *module.buffers())
    ]
    torch_state = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_rng_state().tolist()
    return parts, own, tensors, torch_state


@pytest.fixture(scope="module")
def llama():
    return make("llama")


@pytest.mark.parametrize("interrupts", INTERRUPTS)
@pytest.mark.parametrize("kind", [*SCENARIOS, *GENERATED])
def test_nothing_is_left_of_an_interrupted_run(llama, kind, interrupts):
    """Interrupted at random lines, a run ends with that, the model is as before, and the next run gives the same."""
    graph, tensors, module = _graph(kind), {"ids": llama.inputs()}, llama.module
    expected = run_graph(graph, tensors, module)
    counted = _Tracer()
    _traced(graph, tensors, module, counted)
    before, chosen = _left(module), random.Random(kind)
    for at in (chosen.randint(1, counted.lines) for _ in range(interrupts)):
        with pytest.raises(KeyboardInterrupt):
            _traced(graph, tensors, module, _Tracer(KeyboardInterrupt(), at))
        assert _left(module) == before, f"after an interrupt at line {at} of {counted.lines}"
    again = run_graph(graph, tensors, module)
    assert all(torch.equal(a, b) for a, b in zip(_flat(expected), _flat(again), strict=True))


@pytest.mark.parametrize("kind", [*SCENARIOS, *GENERATED])
def test_nothing_is_left_of_a_cancelled_run(llama, kind):
    """Cancelled at whatever moment it asks, a run leaves nothing."""
    graph, tensors, module = _graph(kind), {"ids": llama.inputs()}, llama.module
    questions = []
    run_graph(graph, tensors, module, cancelled=lambda: bool(questions.append(1)))
    before = _left(module)
    for last in range(1, len(questions) + 1):
        asked = itertools.count(1)
        with pytest.raises(RequestCancelled):
            run_graph(graph, tensors, module, cancelled=lambda asked=asked, last=last: next(asked) == last)
        assert _left(module) == before
    assert len(questions) >= len(graph.nodes) - 1


def _flat(value):
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in items for tensor in _flat(item)]
