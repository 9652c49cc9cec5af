"""Models in the dtypes that GPUs are used for: traces equal plain hooks in the same dtype, bit for bit."""

import pytest
import torch

from nnsight_hpc.execution.values import pack_values, unpack_values
from tests.oracle.architectures import ARCHITECTURES, LANGUAGE, WIDTH, make
from tests.oracle.compare import same
from tests.oracle.hooks import changed, output_hook, seeing

DTYPES = (torch.bfloat16, torch.float16)


def _made(name, dtype):
    subject = make(name)
    subject.module.to(dtype)
    return subject


@pytest.fixture(scope="module", params=[(name, dtype) for name in ARCHITECTURES for dtype in DTYPES], ids=str)
def subject(request):
    """Every architecture in both dtypes."""
    return _made(*request.param)


@pytest.fixture(scope="module", params=[(name, dtype) for name in LANGUAGE for dtype in DTYPES], ids=str)
def lm(request):
    """Those that are language models."""
    return _made(*request.param)


def _inputs(subject):
    ids = subject.inputs()
    return ids if subject.language else ids.to(next(subject.module.parameters()).dtype)


def test_every_module(subject):
    """Outputs of all modules, in the dtype that the module gives."""
    inputs, got = _inputs(subject), {}
    with seeing(subject.module) as seen:
        subject.run(inputs)
    with subject.model.trace(inputs):
        for path in dict.fromkeys(seen.order):
            got[path] = (subject.model.get(path) if path else subject.model).output.save()
    assert [path for path, value in got.items() if not same(value, seen.output(path))] == []


def test_changes_with_constants_of_another_dtype(subject):
    """A float32 direction promotes as in PyTorch, where it is added, and is rounded, where it is written in place."""
    inputs, direction = _inputs(subject), torch.linspace(-1, 1, WIDTH)

    def write(value):
        value += direction.to(value.device)
        value[..., ::2] = 0

    with subject.model.trace(inputs):
        write_here = subject.at(1).output
        write_here += direction
        write_here[..., ::2] = 0
        logits = subject.head_envoy.output.save()
    with changed(subject.module, {subject.path(1): write}):
        assert torch.equal(logits, subject.logits(inputs))


def test_gradients(subject):
    """The gradient at a block is that of autograd."""
    inputs = _inputs(subject)
    with subject.model.trace(inputs):
        hidden = subject.at(1).output
        with subject.head_envoy.output.float().square().mean().backward():
            grad = hidden.grad.save()
    kept, found = [], []

    def keep(value, _call):
        kept.append(value.detach().requires_grad_())
        return kept[0]

    with torch.enable_grad(), output_hook(subject.module, subject.path(1), keep):
        with changed(subject.module, {subject.head: found.append}):
            subject.run(inputs)
        found[0].float().square().mean().backward()
    assert same(grad, kept[0].grad)


def test_generation(lm):
    """Tokens and each step's values are those of plain generation."""
    inputs = lm.inputs()
    with lm.model.generate(inputs, max_new_tokens=5) as tracer:
        states = tracer.list().save()
        with tracer.iter[:]:
            states.append(lm.at(2).output)
        tokens = tracer.result.save()
    with seeing(lm.module) as seen:
        expected = lm.module.generate(inputs, max_new_tokens=5, attention_mask=torch.ones_like(inputs), do_sample=False)
    assert torch.equal(tokens, expected)
    assert same(list(states), seen.outputs[lm.path(2)])


def test_results_that_are_sent(subject):
    """Saved values go through a result frame bit for bit, and arrive on the CPU, detached."""
    with subject.model.trace(_inputs(subject)):
        hidden = subject.at(1).output.save()
        top = subject.head_envoy.output.topk(3).save()
    sent = unpack_values(pack_values({"hidden": hidden, "top": top}))
    assert same(sent["hidden"], hidden.cpu())
    assert same(tuple(sent["top"]), tuple(each.cpu() for each in top))
