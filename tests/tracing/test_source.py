"""``m.source`` in blocks, against the library's own functions patched."""

import functools

import pytest
import torch
from torch import nn
from transformers import modeling_utils
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.llama import modeling_llama

from nnsight_hpc import NNsight
from nnsight_hpc.wire.errors import InvalidGraph, InvalidInput
from tests.oracle.architectures import ATTENTION, WIDTH, make

MODELING = {"llama": modeling_llama, "gpt2": modeling_gpt2}
PROJECTIONS = ("o_proj", "c_proj", "dense", "out_proj")
CASES = pytest.mark.parametrize(
    ("architecture", "implementation"), [(a, i) for a in MODELING for i in ("eager", "sdpa")]
)


def subject_with(architecture, implementation):
    subject = make(architecture)
    subject.module.set_attn_implementation(implementation)
    return subject


def patch_attention(monkeypatch, subject, implementation, function):
    """The oracle: in block 1, `function(real attention function, module, *args, **kwargs)` runs instead."""
    modeling, registry = MODELING[subject.name], modeling_utils.ALL_ATTENTION_FUNCTIONS
    real = modeling.eager_attention_forward if implementation == "eager" else registry["sdpa"]
    chosen = subject.module.get_submodule(subject.path(1, "attention"))

    def patched(module, *args, **kwargs):
        return function(real, module, *args, **kwargs) if module is chosen else real(module, *args, **kwargs)

    if implementation == "eager":
        monkeypatch.setattr(modeling, "eager_attention_forward", patched)
    else:
        monkeypatch.setitem(registry._local_mapping, "sdpa", patched)


@CASES
def test_reads_what_the_attention_function_gets_and_gives(architecture, implementation, monkeypatch):
    """Query and output of `attention_interface_0` are those of the library's function."""
    subject = subject_with(architecture, implementation)
    inputs = subject.inputs()
    with subject.model.trace(inputs):
        attention = subject.at(1, "attention").source.attention_interface_0
        query = attention.inputs[0][1].save()
        output = attention.output[0].save()
        after = subject.at(1, "attention").output[0].save()
    seen = []

    def kept(real, *args, **kwargs):
        seen.append((args, real(*args, **kwargs)))
        return seen[0][1]

    patch_attention(monkeypatch, subject, implementation, kept)
    subject.run(inputs)
    ((args, its_output),) = seen
    assert torch.equal(query, args[1])
    assert torch.equal(output, its_output[0])
    assert output.shape == (2, 5, *subject.heads)
    assert after.shape == (2, 5, WIDTH)


@CASES
@pytest.mark.parametrize("how", ["replaced", "in place"])
def test_changes_the_logits_as_a_patched_function_does(architecture, implementation, how, monkeypatch):
    """A set and a change in place of the attention's output, against an attention function that does the same."""
    subject = subject_with(architecture, implementation)
    inputs = subject.inputs()
    with subject.model.trace(inputs):
        attention = subject.at(1, "attention").source.attention_interface_0
        if how == "replaced":
            attention.output = (attention.output[0] * 2 - 1, None)
        else:
            attention.output[0][:] = attention.output[0] * 2 - 1
        logits = subject.head_envoy.output.save()

    def changed(real, *args, **kwargs):
        output, weights = real(*args, **kwargs)
        return output * 2 - 1, weights

    before = subject.logits(inputs)
    patch_attention(monkeypatch, subject, implementation, changed)
    assert torch.equal(logits, subject.logits(inputs))
    assert not torch.allclose(logits, before)


def test_changes_an_input(monkeypatch):
    """All arguments may be replaced, those that are no data by themselves only."""
    subject = subject_with("llama", "sdpa")
    inputs = subject.inputs()
    with subject.model.trace(inputs):
        attention = subject.at(1, "attention").source.attention_interface_0
        args, kwargs = attention.inputs
        attention.inputs = ((args[0], args[1].flip(-1), args[2], args[3], args[4]), kwargs)
        logits = subject.head_envoy.output.save()
    patch_attention(
        monkeypatch,
        subject,
        "sdpa",
        lambda real, module, query, *args, **kwargs: real(module, query.flip(-1), *args, **kwargs),
    )
    assert torch.equal(logits, subject.logits(inputs))


def test_nested_source(monkeypatch):
    """An operation of the attention function itself: softmax in eager attention, whose output is the pattern."""
    subject = subject_with("llama", "eager")
    inputs = subject.inputs()
    with subject.model.trace(inputs):
        softmax = subject.at(1, "attention").source.attention_interface_0.source.nn_functional_softmax_0
        pattern = softmax.output.save()
        softmax.output = softmax.output.flip(-1)
        logits = subject.head_envoy.output.save()
    seen = []
    real = torch.nn.functional.softmax

    def patched(*args, **kwargs):
        seen.append(real(*args, **kwargs))
        return seen[1].flip(-1) if len(seen) == 2 else seen[-1]

    monkeypatch.setattr(torch.nn.functional, "softmax", patched)
    expected = subject.logits(inputs)
    assert torch.equal(logits, expected)
    assert torch.equal(pattern, seen[1])
    assert pattern.shape == (2, subject.heads[0], 5, 5)


@pytest.mark.parametrize("architecture", ATTENTION)
def test_skipped_attention(architecture):
    """Attention of each architecture, skipped: the projection of the value given is what the module returns."""
    subject = make(architecture)
    given = torch.randn(2, 5, *subject.heads, generator=torch.Generator().manual_seed(3))
    with subject.model.trace(subject.inputs()):
        subject.at(1, "attention").source.attention_interface_0.skip((given, None))
        output = subject.at(1, "attention").output[0].save()
    attention = subject.module.get_submodule(subject.path(1, "attention"))
    project = next(part for name, part in attention.named_children() if name in PROJECTIONS)
    assert torch.equal(output, project(given.reshape(2, 5, -1)))


def test_residual_stream_in_the_middle_of_a_block():
    """What operators make is an operation by the name that it is assigned to."""
    subject = make("llama")
    inputs = subject.inputs()
    with subject.model.trace(inputs):
        middle = subject.at(1).source.hidden_states_1.output.save()
        before = subject.at(1).input.save()
        attention = subject.at(1, "attention").output[0].save()
    assert torch.equal(middle, before + attention)


class Repeated(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        for _ in range(3):
            x = torch.sin(self.linear(x))
        return x


X = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def repeated():
    torch.manual_seed(0)
    return Repeated().requires_grad_(requires_grad=False)


def test_operation_in_a_loop_is_read_call_by_call(repeated):
    """`next()` goes on to the operation's next call."""
    model = NNsight(repeated)
    with model.trace(X):
        sine = model.source.torch_sin_0
        first = sine.output.save()
        third = sine.next(2).output.save()
    passes = [X]
    for _ in range(3):
        passes.append(torch.sin(repeated.linear(passes[-1])))
    assert torch.equal(first, passes[1])
    assert torch.equal(third, passes[3])


def test_listing_shows_the_source_with_names(repeated):
    """Printed, the forward's text has line numbers, and in the margin the operations that begin on a line."""
    first = Repeated.forward.__code__.co_firstlineno
    assert str(NNsight(nn.Sequential(repeated))[0].source) == "\n".join(
        [
            f"0  ({__file__}:{first})",
            f"                 {first} def forward(self, x):",
            f"      range_0 -> {first + 1}     for _ in range(3):",
            f"self_linear_0 -> {first + 2}         x = torch.sin(self.linear(x))",
            "  torch_sin_0 ->   +",
            "          x_0 ->   +",
            f"                 {first + 3}     return x",
        ]
    )


def test_operations_are_listed_completed_and_printed():
    """Iterating gives the operations; `dir` completes their names; one of them shows its line."""
    subject = make("llama")
    source = subject.at(1, "attention").source
    assert "attention_interface_0" in dir(source)
    line = modeling_llama.LlamaAttention.forward.__code__.co_firstlineno
    shown = repr(source.attention_interface_0)
    assert shown.startswith("model.layers.1.self_attn:attention_interface_0  (")
    assert "attn_output, attn_weights = attention_interface(" in shown
    assert line < int(shown.split(".py:")[1].split(":")[0]) < line + 60
    assert [repr(each) for each in source][-1] == repr(source.attn_output_1)
    nested = source.attention_interface_0.source
    assert "torch_nn_functional_scaled_dot_product_attention_0 -> " in str(nested)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "attention_interface_1",
            r"self_attn has no operation 'attention_interface_1'; did you mean attention_interface_0\?",
        ),
        ("zzz", "it has input_shape_0, hidden_shape_0"),
    ],
)
def test_unknown_operation(name, message):
    """The error names near ones, or all."""
    source = make("llama").at(1, "attention").source
    with pytest.raises(AttributeError, match=message):
        getattr(source, name)
    assert not hasattr(source, name)


def test_attributes_that_are_no_points_cannot_be_set():
    """A misspelt `output` is an error, and so is an assignment to the operation itself."""
    operation = make("llama").at(1, "attention").source.attention_interface_0
    with pytest.raises(AttributeError):
        operation.outputs = 1
    with pytest.raises(AttributeError):
        make("llama").at(1, "attention").source.attention_interface_0 = 1


def test_source_of_what_is_no_python():
    """A module without source, and an operation that calls a module, say what to do instead."""
    subject = make("llama")
    with pytest.raises(InvalidGraph, match=r"calls a module, Linear[\s\S]*that module's .source"):
        str(subject.at(1, "attention").source.self_q_proj_0.source)
    hidden = nn.Identity()
    hidden.forward = torch.sin
    with pytest.raises(InvalidGraph, match="sin has no source that can be read"):
        str(NNsight(hidden).source)


def test_operation_has_values_only_in_a_trace():
    """Outside of a block an operation has no value."""
    with pytest.raises(InvalidInput, match="only while the model runs"):
        _ = make("llama").at(1, "attention").source.attention_interface_0.output


class Chooses(nn.Module):
    def forward(self, x):
        for function in (functools.partial(scaled, by=2), functools.partial(scaled, by=3)):
            x = function(x)
        return x


def scaled(x, by):
    return torch.mul(x, by)


def test_nested_source_that_only_a_run_shows():
    """Where the function is known only as the model runs, its operations are believed and checked then."""
    model = NNsight(Chooses())
    nested = model.source.function_0.source
    with pytest.raises(InvalidGraph, match="known only while the model runs"):
        str(nested)
    with model.trace(X):
        second = nested.torch_mul_0.next().output.save()
    assert torch.equal(second, X * 6)
    with (
        pytest.raises(InvalidGraph, match=r"scaled has no operation 'torch_mul_5'[\s\S]*mean torch_mul_0"),
        model.trace(X),
    ):
        nested.torch_mul_5.output.save()


def test_invokes_see_their_own_rows_of_an_operation():
    """In an invoke an operation's tensors have the invoke's rows, as if it ran alone."""
    subject = make("llama")
    inputs = subject.inputs()
    with subject.model.trace() as tracer:
        with tracer.invoke(inputs[:1]):
            first = subject.at(1, "attention").source.attention_interface_0.output[0].save()
        with tracer.invoke(inputs[1:]):
            second = subject.at(1, "attention").source.attention_interface_0.output[0].save()
    with subject.model.trace(inputs):
        both = subject.at(1, "attention").source.attention_interface_0.output[0].save()
    assert first.shape == (1, 5, *subject.heads)
    torch.testing.assert_close(torch.cat([first, second]), both)
