"""Operations inside a module's forward, against the same function replaced in the library that the model calls."""

import sys

import pytest
import torch
from torch import nn

from nnsight_hpc import NNsight
from tests.devices import DEVICE
from tests.oracle.compare import same
from tests.oracle.degrees import every_degree, in_one_process
from tests.oracle.hooks import changed, copied, hooks_of, seeing


class Attention:
    """What transformers calls as attention function, watched or changed for one module."""

    def __init__(self, subject, index, monkeypatch):
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        self._module = subject.module.get_submodule(subject.path(index, "attention"))
        self.change = lambda output: output
        self.arguments, self.outputs = [], []
        kind = subject.module.config._attn_implementation
        if kind == "eager":
            code = sys.modules[type(self._module).__module__]
            self._plain = code.eager_attention_forward
            monkeypatch.setattr(code, "eager_attention_forward", self._watched)
        else:
            self._plain = ALL_ATTENTION_FUNCTIONS[kind]
            monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, kind, self._watched)

    def _watched(self, module, *args, **kwargs):
        output = self._plain(module, *args, **kwargs)
        if module is self._module:
            self.arguments.append(copied(args))
            output = self.change(output)
            self.outputs.append(copied(output))
        return output


@pytest.fixture
def attention(attentive):
    """A function that watches or changes the attention of block 1 while a plain forward runs, and gives what it saw."""

    def run(inputs, change=lambda output: output):
        with pytest.MonkeyPatch.context() as patch:
            watched = Attention(attentive, 1, patch)
            watched.change = change
            watched.logits = attentive.logits(inputs)
        return watched

    return run


def test_output_of_the_attention_function(attentive, attention):
    """`source.attention_interface_0.output` is what the attention function returned."""
    inputs = attentive.inputs()
    with attentive.model.trace(inputs):
        output = attentive.at(1, "attention").source.attention_interface_0.output.save()
    assert same(tuple(output), tuple(attention(inputs).outputs[0]))
    assert hooks_of(attentive.module) == []


@every_degree
def test_arguments_of_the_attention_function(attentive, attention):
    """`inputs` of the operation are the arguments, here queries, keys and values after the module."""
    inputs = attentive.inputs()
    with attentive.model.trace(inputs):
        args = attentive.at(1, "attention").source.attention_interface_0.inputs[0]
        query, key, value = args[1].save(), args[2].save(), args[3].save()
    assert same((query, key, value), attention(inputs).arguments[0][:3])


def test_output_of_the_attention_function_replaced(attentive, attention):
    """A replaced output of the attention function flows on."""
    inputs = attentive.inputs()
    with attentive.model.trace(inputs):
        operation = attentive.at(1, "attention").source.attention_interface_0
        operation.output = (operation.output[0] * 2, None)
        logits = attentive.head_envoy.output.save()
    assert same(logits, attention(inputs, lambda output: (output[0] * 2, None)).logits)


@every_degree
def test_output_of_the_attention_function_changed_in_place(attentive, attention):
    """One head's output set to zero in place."""
    inputs = attentive.inputs()

    def silence(output):
        output[0][:, :, 1] = 0
        return output

    with attentive.model.trace(inputs):
        attentive.at(1, "attention").source.attention_interface_0.output[0][:, :, 1] = 0
        logits = attentive.head_envoy.output.save()
    assert same(logits, attention(inputs, silence).logits)


def test_attention_function_in_invokes(attentive, attention):
    """An invoke sees and changes its own rows of an operation."""
    batch = [attentive.inputs(seed=seed, rows=seed) for seed in (1, 2)]
    with attentive.model.trace() as tracer:
        with tracer.invoke(batch[0]):
            mine = attentive.at(1, "attention").source.attention_interface_0.output[0].save()
            plain = attentive.head_envoy.output.save()
        with tracer.invoke(batch[1]):
            attentive.at(1, "attention").source.attention_interface_0.output[0][:] = 0
            silent = attentive.head_envoy.output.save()

    def silence(output):
        output[0][1:] = 0
        return output

    watched = attention(torch.cat(batch), silence)
    assert same(mine, watched.outputs[0][0][:1])
    assert same(torch.cat([plain, silent]), watched.logits)


def test_call_of_a_module_is_an_operation(any_model):
    """An operation that calls a module is the module's own output."""
    inputs = any_model.inputs()
    operations = {
        "sequential": ("block", "module_0", None),
        "llama": ("attention", "self_o_proj_0", "o_proj"),
        "qwen3": ("attention", "self_o_proj_0", "o_proj"),
        "gemma2": ("attention", "self_o_proj_0", "o_proj"),
        "mixtral": ("mlp", "self_experts_0", "experts"),
        "gpt2": ("attention", "self_c_proj_0", "c_proj"),
        "gpt_neox": ("attention", "self_dense_0", "dense"),
        "opt": ("attention", "self_out_proj_0", "out_proj"),
        "mamba": ("mlp", "self_out_proj_0", "out_proj"),
    }
    part, name, child = operations[any_model.name]
    with any_model.model.trace(inputs):
        output = getattr(any_model.at(1, part).source, name).output.save()
    with seeing(any_model.module) as seen:
        any_model.run(inputs)
    assert same(output, seen.output(f"{any_model.path(1, part)}.{child or 0}"))


class Own(nn.Module):
    """A forward whose operations are easy to replace by hand."""

    def __init__(self, scale=1.0, shift=0.0):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.scale, self.shift = scale, shift

    def forward(self, value):
        hidden = self.inner(value)
        active = torch.relu(hidden)
        active = active * self.scale + self.shift
        return torch.cat([active, hidden], -1).sum(-1)


@pytest.fixture
def own():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), Own(), nn.Identity()).requires_grad_(requires_grad=False).to(DEVICE)


def test_operations_of_an_own_forward(own):
    """Functions of torch in a forward are read and replaced."""
    model, x = NNsight(own), torch.randn(3, 4, device=DEVICE)
    with model.trace(x):
        source = model[1].source
        before = source.torch_relu_0.input.save()
        source.torch_relu_0.output = source.torch_relu_0.output * 2 + 1
        out = model[2].output.save()
    hidden = own[1].inner(own[0](x))
    assert same(before, hidden)
    assert same(out, torch.cat([torch.relu(hidden) * 2 + 1, hidden], -1).sum(-1))
    assert hooks_of(own) == []


def test_input_of_an_operation_replaced(own):
    """The operation computes with what was set as its input."""
    model, x = NNsight(own), torch.randn(3, 4, device=DEVICE)
    with model.trace(x):
        model[1].source.torch_relu_0.input = -model[1].source.torch_relu_0.input
        out = model[2].output.save()
    hidden = own[1].inner(own[0](x))
    assert same(out, torch.cat([torch.relu(-hidden), hidden], -1).sum(-1))


def test_operation_between_points_of_modules(own):
    """An operation lies after the modules that run before it: values go from a module to it, never back."""
    from nnsight_hpc.wire.errors import InvalidGraph

    model, x = NNsight(own), torch.randn(3, 4, device=DEVICE)
    with model.trace(x):
        model[1].source.torch_relu_0.output = model[1].inner.output
        out = model[2].output.save()
    hidden = own[1].inner(own[0](x))
    assert same(out, torch.cat([hidden, hidden], -1).sum(-1))
    with pytest.raises(InvalidGraph, match="torch_relu_0"), model.trace(x):
        model[1].inner.output = model[1].source.torch_relu_0.output
        model[2].output.save()


@in_one_process("about text, nothing is sent")
def test_listing_names_the_operations(any_model):
    """The printed source has the operations' names beside the lines of the forward."""
    text = str(any_model.at(1).source)
    assert "def forward(" in text
    assert any_model.path(1) in text
    with pytest.raises(AttributeError, match="no operation"):
        _ = any_model.at(1).source.nothing_like_it_0


@every_degree
def test_gradient_of_an_operation(attentive):
    """The output of an operation inside a forward has a gradient."""
    inputs = attentive.inputs()
    with attentive.model.trace(inputs):
        mixed = attentive.at(1, "attention").source.attention_interface_0.output[0]
        with attentive.head_envoy.output.log_softmax(-1)[..., 3].sum().backward():
            grad = mixed.grad.save()
    kept = []

    def keep(output):
        kept.append(output[0].detach().requires_grad_())
        return (kept[0], *output[1:])

    with pytest.MonkeyPatch.context() as patch, torch.enable_grad():
        Attention(attentive, 1, patch).change = keep
        found = []
        head = attentive.module.get_submodule(attentive.head)
        handle = head.register_forward_hook(lambda _m, _a, output: found.append(output))
        attentive.run(inputs)
        handle.remove()
        found[0].log_softmax(-1)[..., 3].sum().backward()
    assert same(grad, kept[0].grad)


def test_error_leaves_the_forward_as_it_was(attentive):
    """After an error at an operation the module's forward is its class's again."""
    with pytest.raises(IndexError), attentive.model.trace(attentive.inputs()):
        attentive.at(1, "attention").source.attention_interface_0.output[0][99].save()
    assert hooks_of(attentive.module) == []
    inputs = attentive.inputs()
    with changed(attentive.module, {attentive.path(1): lambda value: value}), attentive.model.trace(inputs):
        logits = attentive.head_envoy.output.save()
    assert same(logits, attentive.logits(inputs))
