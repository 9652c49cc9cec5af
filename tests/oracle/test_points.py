"""Reads, sets and changes in place at the points of every module, bit for bit as with hooks."""
# ruff: noqa: PERF401 - blocks are written as researchers write them

import pytest
import torch
from torch import nn

from nnsight_hpc import NNsight
from tests.devices import DEVICE
from tests.oracle.architectures import WIDTH
from tests.oracle.compare import same
from tests.oracle.degrees import every_degree
from tests.oracle.hooks import changed, counting, forward_of, seeing


def _seen(subject, inputs):
    with seeing(subject.module) as seen:
        subject.run(inputs)
    return seen


@every_degree
@pytest.mark.parametrize("kind", ["output", "input", "inputs"])
def test_reads_every_module_that_runs(any_model, kind):
    """All modules' values, read in one trace, are those that hooks see, in the shape that the module gives them."""
    inputs = any_model.inputs()
    seen = _seen(any_model, inputs)
    paths, got = list(dict.fromkeys(seen.order)), {}
    with any_model.model.trace(inputs):
        for path in paths:
            envoy = any_model.model.get(path) if path else any_model.model
            got[path] = getattr(envoy, kind).save()
    expected = {
        path: {"output": seen.output, "input": seen.input, "inputs": lambda p: seen.inputs[p][0]}[kind](path)
        for path in paths
        if path or kind == "output"  # what the whole model is called with is the tokeniser's business
    }
    assert [path for path, value in expected.items() if not same(got[path], value)] == []


def test_module_that_runs_twice_is_read_at_its_first_call():
    """Of a module that is called twice, `output` is the first call's."""
    tanh = torch.nn.Tanh()
    net = torch.nn.Sequential(tanh, torch.nn.Linear(3, 3), tanh).to(DEVICE)
    x, model = torch.randn(2, 3, device=DEVICE), NNsight(net)
    with model.trace(x):
        value = model[0].output.save()
    assert same(value, x.tanh())


def test_attribute_path_and_index_are_the_same_module(llama):
    """`model.layers[1]`, `get`, negative indices and loops over blocks reach the same points."""
    inputs = llama.inputs()
    seen, states = _seen(llama, inputs), []
    with llama.model.trace(inputs):
        for layer in llama.model.model.layers:
            states.append(layer.output.save())
        last = llama.model.model.layers[-1].output.save()
        sliced = [layer.mlp.output.save() for layer in llama.model.model.layers[1:3]]
        named = llama.model.get("model.layers.2.mlp").output.save()
    assert same(states, [seen.output(f"model.layers.{i}") for i in range(4)])
    assert same(last, seen.output("model.layers.3"))
    assert same(sliced, [seen.output(f"model.layers.{i}.mlp") for i in (1, 2)])
    assert same(named, seen.output("model.layers.2.mlp"))


@pytest.mark.parametrize("index", range(4))
def test_replaced_output_of_a_block(any_model, index):
    """`block.output = v` gives the logits of a hook that returns v."""
    inputs = any_model.inputs()
    with any_model.model.trace(inputs):
        block = any_model.at(index)
        block.output = block.output * 2 - 1
        logits = any_model.head_envoy.output.save()
    with changed(any_model.module, {any_model.path(index): lambda value: value * 2 - 1}):
        assert same(logits, any_model.logits(inputs))


def test_replaced_input_of_a_block(any_model):
    """`block.input = v` gives the logits of a pre-hook that returns v."""
    inputs = any_model.inputs()
    with any_model.model.trace(inputs):
        block = any_model.at(1)
        block.input = torch.sin(block.input)
        logits = any_model.head_envoy.output.save()
    with changed(any_model.module, inputs={any_model.path(1): torch.sin}):
        assert same(logits, any_model.logits(inputs))


def test_replaced_inputs_of_a_block(any_model):
    """`block.inputs = (args, kwargs)` replaces arguments and keywords."""
    inputs = any_model.inputs()
    with any_model.model.trace(inputs):
        block = any_model.at(2)
        args, kwargs = block.inputs[0], block.inputs[1]
        block.inputs = ((args[0] * 3,), kwargs)
        logits = any_model.head_envoy.output.save()

    def tripled(_module, args, kwargs):
        return (args[0] * 3,), kwargs

    handle = any_model.module.get_submodule(any_model.path(2)).register_forward_pre_hook(tripled, with_kwargs=True)
    expected = any_model.logits(inputs)
    handle.remove()
    assert same(logits, expected)


def _neurons(value):
    value[..., -1, [3, 9]] = 10.0


def _zero(value):
    value[:] *= 0


def _half(value):
    value *= 0.5


def _method(value):
    value.mul_(0.5).add_(1)


def _row(value):
    value[1] = value[0]


def _slices(value):
    value[0, ..., ::2] = 0
    value[..., 1:3] += value[..., 3:5]


@pytest.mark.parametrize("change", [_neurons, _zero, _half, _method, _row, _slices])
@pytest.mark.parametrize("kind", ["output", "input"])
def test_change_in_place(any_model, change, kind):
    """The same Python code on the value gives the same logits as in a hook."""
    inputs = any_model.inputs()
    with any_model.model.trace(inputs):
        change(getattr(any_model.at(1), kind))
        logits = any_model.head_envoy.output.save()
    with changed(any_model.module, **{f"{kind}s": {any_model.path(1): change}}):
        assert same(logits, any_model.logits(inputs))


def _every_fifth(value):
    value[..., -1, ::5] = 10.0  # some of them on each rank, where ranks share the value


@every_degree
@pytest.mark.parametrize("kind", ["output", "input"])
def test_change_at_every_module_of_a_block(lm, kind):
    """Neurons set at any module inside of a block, however it is computed, act as in a hook."""
    inputs, logits = lm.inputs(), []
    paths = _seen(lm, inputs).inside(lm.path(1), kind)
    with lm.model.session():
        for path in paths:
            with lm.model.trace(inputs):
                _every_fifth(getattr(lm.model.get(path), kind))
                logits.append(lm.head_envoy.output.save())
    for path, got in zip(paths, logits, strict=True):
        with changed(lm.module, **{f"{kind}s": {path: _every_fifth}}):
            assert same(got, lm.logits(inputs)), path


def test_several_changes_in_one_trace(any_model):
    """Changes at many modules, written from the last to the first, act in the model's order."""
    inputs = any_model.inputs()
    with any_model.model.trace(inputs):
        for index in (3, 2, 1, 0):
            any_model.at(index).output[..., 0] = index
            any_model.at(index, "mlp").output *= 1.5
        logits = any_model.head_envoy.output.save()

    def first_neuron(index):
        def change(value):
            value[..., 0] = index

        return change

    outputs = {any_model.path(i): first_neuron(i) for i in range(4)}
    outputs |= {any_model.path(i, "mlp"): lambda value: value * 1.5 for i in range(4)}
    with changed(any_model.module, outputs):
        assert same(logits, any_model.logits(inputs))


def test_same_output_changed_twice_and_read_between(any_model):
    """Each read shows the value at its line."""
    inputs = any_model.inputs()
    seen = _seen(any_model, inputs).output(any_model.path(1))
    with any_model.model.trace(inputs):
        block = any_model.at(1)
        start = block.output.save()
        block.output = block.output + 1
        middle = block.output.save()
        block.output[:] = block.output * 2
        end = block.output.save()
        logits = any_model.head_envoy.output.save()
    assert same(start, seen)
    assert same(middle, seen + 1)
    assert same(end, (seen + 1) * 2)
    with changed(any_model.module, {any_model.path(1): lambda value: (value + 1) * 2}):
        assert same(logits, any_model.logits(inputs))


def test_changed_output_of_one_block_is_the_input_of_the_next(any_model):
    """What was set at a block's output is read at the next block's input."""
    inputs = any_model.inputs()
    with any_model.model.trace(inputs):
        any_model.at(1).output = torch.cos(any_model.at(1).output)
        following = any_model.at(2).input.save()
        before = any_model.at(1).output.save()
    assert same(following, before)
    assert same(following, _seen(any_model, inputs).output(any_model.path(1)).cos())


def test_activation_swapped_between_blocks(any_model):
    """A later block's output is replaced by one computed from an earlier block's."""
    inputs = any_model.inputs()
    early = _seen(any_model, inputs).output(any_model.path(0))
    with any_model.model.trace(inputs):
        source = any_model.at(0).output
        any_model.at(2).output = source.flip(0) - any_model.at(2).output
        logits = any_model.head_envoy.output.save()
    with changed(any_model.module, {any_model.path(2): lambda value: early.flip(0) - value}):
        assert same(logits, any_model.logits(inputs))


def test_attention_returns_a_tuple(attentive):
    """`attention.output[0]` is the tensor in the tuple; reading, replacing the tuple and changing in it work."""
    inputs = attentive.inputs()
    seen = _seen(attentive, inputs).output(attentive.path(1, "attention"))
    with attentive.model.trace(inputs):
        whole = attentive.at(1, "attention").output.save()
        inner = attentive.at(1, "attention").output[0].save()
        attentive.at(1, "attention").output[0][:, -1] = 0
        attentive.at(2, "attention").output = (attentive.at(2, "attention").output[0] * 2, None)
        logits = attentive.head_envoy.output.save()
    assert isinstance(whole, tuple)
    assert same(whole, seen)
    assert same(inner, seen[0])

    def zero_last(value):
        value[0][:, -1] = 0

    hooks = {attentive.path(1, "attention"): zero_last, attentive.path(2, "attention"): lambda v: (v[0] * 2, None)}
    with changed(attentive.module, hooks):
        assert same(logits, attentive.logits(inputs))


@every_degree
def test_model_output_by_name_and_attribute(lm):
    """The whole model's output has its fields by attribute and by key; `output.logits` may be computed with in the block."""
    inputs = lm.inputs()
    with torch.no_grad():
        expected = lm.run(inputs).logits
    with lm.model.trace(inputs):
        out = lm.model.output.save()
        tokens = lm.model.output.logits.argmax(-1).save()
        by_key = lm.model.output["logits"][:, -1].save()
    assert same(out.logits, expected)
    assert same(out["logits"], expected)
    assert same(tokens, expected.argmax(-1))
    assert same(by_key, expected[:, -1])


@every_degree
def test_parameters_are_values(any_model):
    """A parameter inside a trace is the module's own, also under arithmetic, and cannot be changed."""
    inputs, head = any_model.inputs(), any_model.module.get_submodule(any_model.head)
    before = head.weight.clone()
    with any_model.model.trace(inputs):
        envoy = any_model.head_envoy
        weight = envoy.weight.save()
        logits = (envoy.input @ envoy.weight.T).save()
    seen = _seen(any_model, inputs)
    assert same(weight, head.weight)
    assert same(logits, seen.input(any_model.head) @ head.weight.T)
    weight.zero_()
    assert same(head.weight, before)


@every_degree
def test_logit_lens(any_model):
    """The final norm and the head, called on every block's output, give what they give in plain PyTorch."""
    inputs, lenses = any_model.inputs(), []
    seen = _seen(any_model, inputs)
    norm, head = any_model.model.get(any_model.norm), any_model.head_envoy
    with any_model.model.trace(inputs):
        for index in range(4):
            lenses.append(head(norm(any_model.at(index).output)).softmax(-1).save())
    plain_norm = any_model.module.get_submodule(any_model.norm)
    plain_head = any_model.module.get_submodule(any_model.head)
    with torch.no_grad():
        expected = [plain_head(plain_norm(seen.output(any_model.path(i)))).softmax(-1) for i in range(4)]
    assert same(lenses, expected)


def test_called_module_that_works_in_place_changes_nothing_of_the_model():
    """A module that writes into its input, called on a value that was read, writes into a copy."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU(inplace=True)).eval()
    x, model = torch.randn(3, 4), NNsight(module)
    with model.trace(x):
        called = model[2](model[0].output).save()
        read = model[0].output.save()
        later = model[1].output.save()
    first = module[0](x)
    assert torch.equal(called, first.relu())
    assert torch.equal(read, first)
    assert torch.equal(later, module[1](first))


def test_called_module_sees_no_change_of_its_own_point(any_model):
    """A change at a module's output acts on the model's call of it, not on the researcher's."""
    inputs = any_model.inputs()
    seen = _seen(any_model, inputs)
    with any_model.model.trace(inputs):
        head = any_model.head_envoy
        head.output = head.output * 0
        called = head(any_model.model.get(any_model.norm).output).save()
        changed_output = head.output.save()
    head = any_model.module.get_submodule(any_model.head)
    assert same(called, head(seen.output(any_model.norm)))
    assert not changed_output.any()


@every_degree
@pytest.mark.parametrize("index", [0, 2])
def test_skipped_block(any_model, index):
    """The block is not run, its output is the given value, and what comes after computes with it."""
    inputs = any_model.inputs()
    path = any_model.path(index)
    with counting(any_model.module) as ran, any_model.model.trace(inputs):
        any_model.at(index).skip(any_model.at(index).input * 2)
        output = any_model.at(index).output.save()
        logits = any_model.head_envoy.output.save()
    assert not [name for name in ran if name == path or name.startswith(f"{path}.")]
    with forward_of(any_model.module, path, lambda _forward, value, *_args, **_kwargs: value * 2):
        expected, seen = any_model.logits(inputs), _seen(any_model, inputs)
    assert same(logits, expected)
    assert same(output, seen.output(path))


def test_skipped_attention_returns_a_tuple(attentive):
    """What a skipped module returns may be a tuple made in the block."""
    inputs = attentive.inputs()
    with attentive.model.trace(inputs):
        attention = attentive.at(1, "attention")
        attention.skip((torch.zeros_like(attentive.at(1).input), None))
        logits = attentive.head_envoy.output.save()
    zeros = torch.zeros(2, 5, WIDTH, device=DEVICE)
    with forward_of(attentive.module, attentive.path(1, "attention"), lambda _forward, *_a, **_k: (zeros, None)):
        assert same(logits, attentive.logits(inputs))


def test_skipped_by_what_an_earlier_block_gave(any_model):
    """Two blocks in a row are skipped with the value of the one before them."""
    inputs = any_model.inputs()
    with any_model.model.trace(inputs):
        for index in (1, 2):
            any_model.at(index).skip(any_model.at(0).output)
        logits = any_model.head_envoy.output.save()
    same_value = lambda _forward, value, *_args, **_kwargs: value  # noqa: E731 - a forward in one line
    with (
        forward_of(any_model.module, any_model.path(1), same_value),
        forward_of(any_model.module, any_model.path(2), same_value),
    ):
        assert same(logits, any_model.logits(inputs))


def test_order_is_that_of_the_run_and_not_of_registration(any_model):
    """A module that was registered before another one, and runs after it, is set from it."""
    inputs = any_model.inputs()
    seen = _seen(any_model, inputs)
    order = [path for path in seen.order if path and isinstance(seen.output(path), torch.Tensor)]
    registered = [path for path, _ in any_model.module.named_modules()]
    near = [(a, b) for position, a in enumerate(order) for b in order[position + 1 : position + 12]]
    swapped = [pair for pair in near if registered.index(pair[1]) < registered.index(pair[0])]
    for earlier, later in swapped[:4]:
        with any_model.model.trace(inputs):
            scale = any_model.model.get(earlier).output.mean()
            any_model.model.get(later).output = any_model.model.get(later).output * scale
            logits = any_model.head_envoy.output.save()
        factor = seen.output(earlier).mean()
        with changed(any_model.module, {later: lambda value, factor=factor: value * factor}):
            assert same(logits, any_model.logits(inputs)), (earlier, later)
    if any_model.name in {"opt", "gpt_neox"}:
        assert swapped, "these register a norm before what runs before it"
