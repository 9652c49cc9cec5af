"""Blocks against plain PyTorch hooks on the same model."""

import numpy as np
import pytest
import torch
from torch import nn

from nnsight_hpc import Graph, LanguageModel, NNsight
from nnsight_hpc.execution import run_graph
from nnsight_hpc.models import prepare_inputs
from nnsight_hpc.wire.errors import ExecutionFailed, InvalidGraph, InvalidInput

PROMPT = "the tower is in the city of"


@pytest.fixture(scope="module")
def lm(tiny_llama):
    return LanguageModel(str(tiny_llama), dispatch=True)


def _hooked(lm, path, hook, prompt=PROMPT):
    """Plain PyTorch: the logits with one forward hook on one module."""
    handle = lm.module.get_submodule(path).register_forward_hook(hook)
    try:
        return lm.module(**prepare_inputs(prompt, lm.tokenizer), use_cache=False).logits
    finally:
        handle.remove()


def test_reads_a_layer(lm):
    """A saved output is what a hook sees, and the name is bound to a plain tensor."""
    seen = {}
    _hooked(lm, "model.layers.1", lambda _m, _i, out: seen.update(out=out))
    with lm.trace(PROMPT):
        hidden = lm.model.layers[1].output.save()
    assert type(hidden) is torch.Tensor
    assert torch.equal(hidden, seen["out"])


def test_sets_neurons_in_place(lm):
    """The change of the nnsight paper, against a pre-hook."""
    neurons = [3, 9]

    def pre(_m, args):
        args[0][:, -1, neurons] = 10

    handle = lm.module.model.layers[1].mlp.down_proj.register_forward_pre_hook(pre)
    expected = lm.module(**prepare_inputs(PROMPT, lm.tokenizer)).logits
    handle.remove()
    with lm.trace(PROMPT):
        lm.model.layers[1].mlp.down_proj.input[:, -1, neurons] = 10
        out = lm.output.save()
    assert torch.equal(out["logits"], expected)
    assert torch.equal(out.logits, expected)


@pytest.mark.parametrize(
    ("write", "hook"),
    [
        (lambda m: setattr(m, "output", m.output * 2), lambda _m, _i, o: o * 2),
        (lambda m: m.output.__setitem__(slice(None), 0), lambda _m, _i, o: torch.zeros_like(o)),
        (lambda m: m.output.mul_(0.5), lambda _m, _i, o: o * 0.5),
        (lambda m: setattr(m, "output", torch.relu(m.output)), lambda _m, _i, o: torch.relu(o)),
        (lambda m: setattr(m, "output", 1 - m.output / 2), lambda _m, _i, o: 1 - o / 2),
        (lambda m: setattr(m, "output", m.output @ torch.eye(32)), lambda _m, _i, o: o @ torch.eye(32)),
        (lambda m: setattr(m, "output", torch.ones(32) * m.output), lambda _m, _i, o: torch.ones(32) * o),
    ],
    ids=["replace", "setitem", "method", "torch", "reflected", "matmul", "tensor first"],
)
def test_ways_to_change_an_output(lm, write, hook):
    """Each way to write a change gives bit for bit what a hook gives."""
    with lm.trace(PROMPT):
        write(lm.model.layers[0])
        logits = lm.lm_head.output.save()
    assert torch.equal(logits, _hooked(lm, "model.layers.0", hook))


def test_augmented_assignments(lm):
    """`*=` on an output and on a slice of it changes the model."""
    with lm.trace(PROMPT):
        lm.model.layers[0].output *= 2
        lm.model.layers[0].output[:, -1] += 1
        logits = lm.lm_head.output.save()

    def hook(_m, _i, out):
        out = out * 2
        out[:, -1] += 1
        return out

    assert torch.equal(logits, _hooked(lm, "model.layers.0", hook))


def test_logit_lens(lm):
    """Modules called on a value inside a block."""
    with lm.trace(PROMPT):
        hidden = lm.model.layers[0].output.save()
        lens = lm.lm_head(lm.model.norm(hidden)).softmax(-1).topk(3).indices.save()
    assert torch.equal(lens, lm.module.lm_head(lm.module.model.norm(hidden)).softmax(-1).topk(3).indices)


def test_containers_of_the_caller_are_bound(lm):
    """Saved values in lists, dicts and tuples become real, also inside a function, and others stay."""

    def collect():
        states, named, pair, number = [], {}, None, 7
        with lm.trace(PROMPT):
            for index, layer in enumerate(lm.model.layers):
                states.append(layer.output.save())
                named[index] = [layer.output[0, -1].save()]
            pair = (layer.output.sum().save(), number)
        return states, named, pair

    states, named, pair = collect()
    assert [type(s) for s in states] == [torch.Tensor] * 3
    assert all(torch.equal(named[i][0], states[i][0, -1]) for i in range(3))
    assert torch.equal(pair[0], states[-1].sum())
    assert pair[1] == 7


def test_session_hands_a_value_to_the_next_trace(lm):
    """Activation patching in one session equals patching with hooks."""
    other = "the capital is in the city of"
    seen = {}
    _hooked(lm, "model.layers.1", lambda _m, _i, o: seen.update(o=o.clone()))

    def patch(_m, _i, out):
        out[:, -1] = seen["o"][:, -1]

    expected = _hooked(lm, "model.layers.1", patch, other)
    with lm.session() as session:
        with lm.trace(PROMPT):
            clean = lm.model.layers[1].output
        with lm.trace(other):
            lm.model.layers[1].output[:, -1] = clean[:, -1]
            logits = lm.lm_head.output.save()
    assert torch.equal(logits, expected)
    assert session.graph.kind == "session"


def test_graph_of_a_trace_runs_again(lm):
    """The recorded graph, after JSON, gives the same values by name."""
    with lm.trace(PROMPT) as tracer:
        total = lm.model.layers[2].output.sum().save()
    graph = Graph.from_json(tracer.graph.to_json())
    assert graph.saves.keys() == {"total"}
    assert torch.equal(run_graph(graph, tracer.recorder.tensors, lm.module)["total"], total)


def test_plain_module():
    """NNsight wraps any module; arguments of the trace are those of the module."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(3, 4)
    model = NNsight(net)
    with model.trace(x):
        hidden = model[1].output.save()
        weight = model[0].weight.abs().sum().save()
    assert torch.equal(hidden, net[:2](x))
    assert torch.equal(weight, net[0].weight.abs().sum())


def test_inplace_modules_do_not_change_what_was_saved():
    """A save before a module that writes in place keeps the old value."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    x = torch.randn(3, 4)
    model = NNsight(net)
    with model.trace(x):
        before = model[0].output.save()
        after = model[1].output.save()
    assert torch.equal(before, net[0](x))
    assert torch.equal(after, net(x))


def test_weights_load_at_the_first_local_run(tiny_llama):
    """An undispatched model has a tree and a tokenizer; the first trace loads the weights."""
    model = LanguageModel(str(tiny_llama))
    assert next(model._module.parameters()).is_meta
    with model.trace(PROMPT):
        hidden = model.model.layers[0].output.save()
    assert not next(model._module.parameters()).is_meta
    assert not hidden.is_meta


def test_error_shows_the_user_s_line(lm):
    """A wrong index raises IndexError; the message begins with this file and line, and shows the shapes."""
    with pytest.raises(IndexError) as caught, lm.trace(PROMPT):
        lm.model.layers[0].output[:, 99].save()
    assert isinstance(caught.value, ExecutionFailed)
    first, second, third = str(caught.value).splitlines()
    assert "test_trace.py" in first
    assert "lm.model.layers[0].output[:, 99].save()" in first
    assert "index 99 is out of bounds" in second
    assert "float32[1, 7, 32]" in third


def test_error_in_the_block_runs_nothing(lm):
    """An exception of the user's own in the block comes out as it is, and the next trace works."""
    with pytest.raises(ZeroDivisionError), lm.trace(PROMPT):
        lm.model.layers[0].output.save()
        _ = 1 / 0
    with lm.trace(PROMPT):
        ok = lm.model.layers[0].output.save()
    assert ok.shape == (1, 7, 32)


@pytest.mark.parametrize(
    "use", [bool, len, list, float, int, lambda v: 3 in v], ids=["bool", "len", "iter", "float", "int", "in"]
)
def test_what_needs_the_value_now_is_refused(lm, use):
    """Truth, length, iteration and numbers of a value are refused while the block is recorded."""
    with pytest.raises(InvalidInput, match="not known while the block is recorded"), lm.trace(PROMPT):
        use(lm.model.layers[0].output)


def test_unsaved_value_after_the_block_is_named(lm):
    """Using a value that was not saved says so, with the line that made it."""
    with lm.trace(PROMPT):
        hidden = lm.model.layers[0].output
    with pytest.raises(InvalidInput, match="not saved"):
        _ = hidden + 1
    with pytest.raises(InvalidInput, match=r"test_trace\.py"):
        hidden.result()


def test_points_outside_of_a_block_are_refused(lm):
    """Outside of a trace a module has no output."""
    with pytest.raises(InvalidInput, match="only while the model runs"):
        _ = lm.model.layers[0].output


@pytest.mark.parametrize(
    "use",
    [
        lambda v: v.numpy(),
        lambda v: v.data_ptr(),
        lambda v: v.register_hook(print),
        torch.randn_like,
        lambda v: torch.add(v, 1, out=torch.zeros(1)),
        lambda v: torch.zeros(7).__setitem__(0, v[0, 0, 0]),
        lambda v: torch.zeros(7).add_(v[0, :, 0]),
        lambda v: v.map_(v, print),
    ],
    ids=["numpy", "pointer", "hook", "random", "out", "outside", "outside in place", "callback"],
)
def test_operations_that_are_not_allowed(lm, use):
    """What is not on the list is refused at the user's line; nothing runs."""
    with pytest.raises((InvalidGraph, TypeError)), lm.trace(PROMPT):
        use(lm.model.layers[0].output)


def test_misspelt_module_gets_near_names(lm):
    """An attribute that the module does not have is refused with what it has."""
    with pytest.raises(AttributeError, match="did you mean layers"):
        _ = lm.model.layer
    with pytest.raises(AttributeError, match="cannot be set"):
        lm.model.layers[0].ouput = 3


def test_print_shows_the_module_tree(lm):
    """`print(model)` is the tree of the real model, without weights being loaded."""
    assert str(lm) == str(lm.module)
    assert repr(lm.model.layers[0].mlp) == repr(lm.module.model.layers[0].mlp)
    assert lm.get("model.layers.2.mlp")._path == "model.layers.2.mlp"
    assert "layers" in dir(lm.model)


def test_nested_traces_are_refused(lm):
    """A trace inside a trace is refused with the advice to use a session."""
    with pytest.raises(InvalidInput, match="inside another"), lm.trace(PROMPT), lm.trace(PROMPT):
        pass
    with lm.trace(PROMPT):
        ok = lm.lm_head.output.save()
    assert ok.ndim == 3


def test_batch_rows_equal_prompts_alone(lm):
    """Each row of a batch of unequal prompts equals its prompt alone (atol 1e-5: other matrix shapes)."""
    prompts = [PROMPT, "one two"]
    with lm.trace(prompts):
        both = lm.lm_head.output[:, -1].save()
    for row, prompt in enumerate(prompts):
        with lm.trace(prompt):
            alone = lm.lm_head.output[0, -1].save()
        torch.testing.assert_close(both[row], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "compute",
    [
        lambda v: torch.nn.functional.softmax(v, dim=-1),
        lambda v: torch.nn.functional.log_softmax(v, dim=-1),
        torch.nn.functional.relu,
        torch.nn.functional.silu,
        torch.nn.functional.normalize,
        lambda v: torch.norm(v, dim=-1),
        lambda v: torch.tensordot(v, torch.ones(32), 1),
        lambda v: np.float64(2) - v,
        lambda v: v[:, range(2)],
    ],
    ids=["softmax", "log_softmax", "relu", "silu", "normalize", "norm", "tensordot", "number", "range"],
)
def test_operations_equal_those_on_the_tensor(lm, compute):
    """Torch's Python functions, numbers of numpy and ranges give what they give on the tensor itself, also after JSON."""
    with lm.trace(PROMPT) as tracer:
        hidden = lm.model.layers[0].output.save()
        result = compute(hidden).save()
    graph = Graph.from_json(tracer.graph.to_json())
    assert torch.equal(result, compute(hidden))
    assert torch.equal(run_graph(graph, tracer.recorder.tensors, lm.module)["result"], result)


def test_array_on_the_left_of_a_value(lm):
    """An array and a value give a value, not an array of values."""
    array = np.linspace(1, 2, 32)
    with lm.trace(PROMPT):
        hidden = lm.model.layers[0].output.save()
        result = (array / hidden).save()
    assert torch.equal(result, torch.as_tensor(array) / hidden)


def test_tensor_that_was_set_is_a_value_again(lm):
    """An output that was replaced by a tensor of the researcher can be changed and saved, and the tensor stays as it was."""
    mine = torch.ones(1, 7, 32)
    with lm.trace(PROMPT):
        lm.model.layers[1].output = mine
        lm.model.layers[1].output[:, 0] = 5
        changed = lm.model.layers[1].output.save()
        logits = lm.lm_head.output.save()
    expected = torch.ones(1, 7, 32)
    expected[:, 0] = 5
    assert torch.equal(changed, expected)
    assert torch.equal(logits, _hooked(lm, "model.layers.1", lambda _m, _i, _o: expected))
    assert torch.equal(mine, torch.ones(1, 7, 32))


def test_two_saves_under_one_name_are_both_returned(lm):
    """Places that read the same as text do not hide one another."""

    class Key:
        def __repr__(self):
            return "key"

    found = {}
    with lm.trace(PROMPT):
        for index in range(2):
            found[Key()] = lm.model.layers[index].output.save()
    first, second = found.values()
    assert not torch.equal(first, second)


def test_output_cannot_be_set_to_none(lm):
    """None would silently change nothing, so it is refused at the user's line."""
    with pytest.raises(TypeError, match="cannot be set to None"), lm.trace(PROMPT):
        lm.model.layers[0].output = None


def test_module_named_like_a_point():
    """A child that is named `output` is reached by `get`."""
    net = nn.ModuleDict({"output": nn.Linear(2, 2)})
    assert NNsight(net).get("output")._path == "output"


def test_trace_in_a_session_has_the_session_s_graph(lm):
    """After the session, the graph of each of its traces is the one that ran."""
    with lm.session() as session, lm.trace(PROMPT) as tracer:
        total = lm.model.layers[0].output.sum().save()
    assert tracer.graph is session.graph
    assert total.ndim == 0
