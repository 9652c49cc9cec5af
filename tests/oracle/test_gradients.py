"""Gradients of values, read and changed during the backward pass, against autograd on hooked activations, bit for bit."""
# ruff: noqa: PERF401 - blocks are written as researchers write them

import signal
from contextlib import ExitStack, contextmanager

import pytest
import torch

from tests.oracle.architectures import make
from tests.oracle.compare import close, same
from tests.oracle.degrees import every_degree, in_one_process
from tests.oracle.hooks import changed, hooks_of, output_hook, seeing


class Plain:
    """One plain forward whose activations at some modules can be asked for gradients."""

    def __init__(self, subject):
        self.subject, self.values = subject, {}

    @contextmanager
    def watching(self, *paths):
        """The outputs of these modules require a gradient and keep it."""

        def watch(path):
            def hook(value, _call):
                if value.requires_grad:
                    value.retain_grad()
                else:
                    value = value.detach().requires_grad_()
                self.values[path] = value
                return value

            return hook

        with ExitStack() as stack, torch.enable_grad():
            for path in paths:
                stack.enter_context(output_hook(self.subject.module, path, watch(path)))
            yield self

    def logits(self, inputs):
        found = []
        with output_hook(self.subject.module, self.subject.head, lambda value, _call: found.append(value)):
            self.subject.run(inputs)
        return found[0]

    def grad(self, path):
        return self.values[path].grad


def _loss(logits):
    return logits.log_softmax(-1)[..., 3].sum()


def _expected(subject, inputs, loss=_loss, blocks=range(4)):
    """The gradient of a loss of the logits at each block's output."""
    paths = [subject.path(index) for index in blocks]
    with Plain(subject).watching(*paths) as plain:
        loss(plain.logits(inputs)).backward()
    return [plain.grad(path) for path in paths]


def test_gradient_of_every_block(any_model):
    """`x.grad` inside `with loss.backward():` is autograd's, at all blocks at once."""
    inputs, grads = any_model.inputs(), []
    with any_model.model.trace(inputs):
        hidden = [any_model.at(index).output for index in range(4)]
        loss = _loss(any_model.head_envoy.output)
        with loss.backward():
            for value in hidden:
                grads.append(value.grad.save())
    for got, expected in zip(grads, _expected(any_model, inputs), strict=True):
        assert same(got, expected)


def test_gradient_asked_for_before_backward(any_model):
    """`x.grad` above `loss.backward()`, as in nnsight's older form, is the gradient of that backward pass."""
    inputs = any_model.inputs()
    with any_model.model.trace(inputs):
        grad = any_model.at(1).output.grad.save()
        loss = _loss(any_model.head_envoy.output).save()
        loss.backward()
    assert same(grad, _expected(any_model, inputs)[1])
    assert same(loss.detach(), _loss(any_model.logits(inputs)))


def test_gradient_asked_for_after_backward(any_model):
    """`x.grad` below `loss.backward()`, as in plain PyTorch."""
    inputs = any_model.inputs()
    with any_model.model.trace(inputs):
        hidden = any_model.at(2).output
        _loss(any_model.head_envoy.output).backward()
        grad = hidden.grad.save()
    assert same(grad, _expected(any_model, inputs)[2])


def test_gradient_of_inputs_and_submodules(any_model):
    """Gradients of a module's input and of an inner module's output."""
    inputs, path = any_model.inputs(), any_model.path(1, "mlp")
    with any_model.model.trace(inputs):
        inner, entry = any_model.at(1, "mlp").output, any_model.at(2).input
        with _loss(any_model.head_envoy.output).backward():
            inner_grad, entry_grad = inner.grad.save(), entry.grad.save()
    with Plain(any_model).watching(path, any_model.path(1)) as plain:
        _loss(plain.logits(inputs)).backward()
    assert same(inner_grad, plain.grad(path))
    assert same(entry_grad, plain.grad(any_model.path(1)))


@every_degree
def test_gradient_at_every_module_of_a_block(lm):
    """Inside of a block every module's output has its gradient, and one that is set there flows on."""
    inputs, first = lm.inputs(), lm.path(0)
    with seeing(lm.module) as seen:
        lm.run(inputs)
    paths, grads, flowed = seen.inside(lm.path(1)), [], []
    with lm.model.session():
        for path in paths:
            with lm.model.trace(inputs):
                earlier, inner = lm.at(0).output, lm.model.get(path).output
                with _loss(lm.head_envoy.output).backward():
                    grads.append(inner.grad.save())
                    inner.grad[..., ::5] = 1
                    flowed.append(earlier.grad.save())

    def ones(gradient):
        gradient = gradient.clone()
        gradient[..., ::5] = 1
        return gradient

    for path, got, flow in zip(paths, grads, flowed, strict=True):
        with Plain(lm).watching(first, path) as plain:
            logits, kept = plain.logits(inputs), []
            plain.values[path].register_hook(lambda gradient, kept=kept: kept.append(gradient) or ones(gradient))
            _loss(logits).backward()
        assert same(got, kept[0]), path
        assert same(flow, plain.grad(first)), path


def test_gradient_of_a_computed_value(any_model):
    """A value that the researcher computed and put into the model has a gradient as well."""
    inputs = any_model.inputs()
    with any_model.model.trace(inputs):
        scaled = any_model.at(1).output * 2
        any_model.at(1).output = scaled
        with _loss(any_model.head_envoy.output).backward():
            grad = scaled.grad.save()
    kept = []

    def scale(value, _call):
        kept.append((value.detach() * 2).requires_grad_())
        return kept[0]

    with torch.enable_grad(), output_hook(any_model.module, any_model.path(1), scale):
        _loss(Plain(any_model).logits(inputs)).backward()
    assert same(grad, kept[0].grad)


def _hooked_gradient(subject, inputs, change):
    """Gradients at all blocks when the one at block 2 is changed on its way."""
    paths = [subject.path(index) for index in range(4)]
    with Plain(subject).watching(*paths) as plain:
        logits = plain.logits(inputs)
        plain.values[paths[2]].register_hook(change)
        _loss(logits).backward()
    return [plain.grad(path) for path in paths]


@pytest.mark.parametrize("index", [0, 1])
def test_gradient_that_is_set_flows_on(any_model, index):
    """`x.grad = v` is what the layers before get."""
    inputs = any_model.inputs()
    with any_model.model.trace(inputs):
        earlier, hidden = any_model.at(index).output, any_model.at(2).output
        with _loss(any_model.head_envoy.output).backward():
            hidden.grad = hidden.grad * 3 + 1
            grad = earlier.grad.save()
    assert same(grad, _hooked_gradient(any_model, inputs, lambda g: g * 3 + 1)[index])


def test_gradient_changed_in_place_flows_on(any_model):
    """`x.grad[...] = 0` is what the layers before get."""
    inputs = any_model.inputs()
    with any_model.model.trace(inputs):
        earlier, hidden = any_model.at(0).output, any_model.at(2).output
        with _loss(any_model.head_envoy.output).backward():
            hidden.grad[..., ::2] = 0
            grad = earlier.grad.save()

    def zero(gradient):
        gradient = gradient.clone()
        gradient[..., ::2] = 0
        return gradient

    assert same(grad, _hooked_gradient(any_model, inputs, zero)[0])


def test_gradient_replaced_by_zeros_stops_there(any_model):
    """With a gradient of zeros the layers before get zeros."""
    inputs = any_model.inputs()
    with any_model.model.trace(inputs):
        earlier, hidden = any_model.at(0).output, any_model.at(2).output
        with _loss(any_model.head_envoy.output).backward():
            hidden.grad[:] = 0
            grad = earlier.grad.save()
    assert grad.shape == inputs.shape[:-1] + grad.shape[-1:] if not any_model.language else grad.ndim == 3
    assert not grad.any()


def test_attribution_patching(any_model):
    """(clean - corrupt) * gradient, summed, at every block, in one session of two traces."""
    clean, corrupt = any_model.inputs(seed=1), any_model.inputs(seed=2)
    scores = []
    with any_model.model.session():
        with any_model.model.trace(clean):
            cleans = [any_model.at(index).output for index in range(4)]
        with any_model.model.trace(corrupt):
            corrupts = [any_model.at(index).output for index in range(4)]
            with _loss(any_model.head_envoy.output).backward():
                for one, other in zip(cleans, corrupts, strict=True):
                    scores.append(((one - other) * other.grad).sum().save())
    with seeing(any_model.module) as seen_clean:
        any_model.run(clean)
    with seeing(any_model.module) as seen:
        any_model.run(corrupt)
    for index, gradient in enumerate(_expected(any_model, corrupt)):
        path = any_model.path(index)
        expected = ((seen_clean.output(path) - seen.output(path)) * gradient).sum()
        assert same(scores[index].detach(), expected)


def test_gradient_of_one_invoke_of_two(any_model):
    """A loss on one invoke's logits gives its rows the gradient of that prompt alone (atol 1e-5), the other's none."""
    batch = [any_model.inputs(seed=seed, rows=seed) for seed in (1, 2)]
    with any_model.model.trace() as tracer:
        with tracer.invoke(batch[0]):
            other = any_model.head_envoy.output.save()
        with tracer.invoke(batch[1]):
            hidden = any_model.at(1).output
            with _loss(any_model.head_envoy.output).backward():
                grad = hidden.grad.save()
    close(grad, _expected(any_model, batch[1])[1], atol=1e-5, rtol=1e-4)
    close(other.detach(), any_model.logits(batch[0]), atol=1e-5, rtol=1e-4)


def test_gradients_of_both_invokes(any_model):
    """Two losses in two invokes of one forward: each has its own gradient."""
    batch = [any_model.inputs(seed=seed) for seed in (1, 2)]
    grads = []
    with any_model.model.trace() as tracer:
        for inputs in batch:
            with tracer.invoke(inputs):
                hidden = any_model.at(1).output
                with _loss(any_model.head_envoy.output).backward(retain_graph=True):
                    grads.append(hidden.grad.save())
    for grad, inputs in zip(grads, batch, strict=True):
        close(grad, _expected(any_model, inputs)[1], atol=1e-5, rtol=1e-4)


def test_two_backward_passes(any_model):
    """With `retain_graph=True` a second loss has a gradient of its own, not the sum of both."""
    inputs = any_model.inputs()
    with any_model.model.trace(inputs):
        hidden, logits = any_model.at(1).output, any_model.head_envoy.output
        with _loss(logits).backward(retain_graph=True):
            first = hidden.grad.save()
        with logits.square().mean().backward():
            second = hidden.grad.save()
    assert same(first, _expected(any_model, inputs)[1])
    assert same(second, _expected(any_model, inputs, loss=lambda logits: logits.square().mean())[1])


def test_backward_with_a_gradient(any_model):
    """`v.backward(gradient=w)` of a value that is no number."""
    inputs = any_model.inputs()
    with any_model.model.trace(inputs):
        hidden, logits = any_model.at(1).output, any_model.head_envoy.output
        with logits.backward(gradient=torch.ones_like(logits) * 2):
            grad = hidden.grad.save()
    assert same(grad, _expected(any_model, inputs, loss=lambda logits: (logits * 2).sum())[1])


def test_gradient_of_a_changed_model(any_model):
    """A change of a later layer is part of what is differentiated."""
    inputs = any_model.inputs()
    with any_model.model.trace(inputs):
        hidden = any_model.at(0).output
        any_model.at(2).output = any_model.at(2).output * 0.5
        with _loss(any_model.head_envoy.output).backward():
            grad = hidden.grad.save()
    with changed(any_model.module, {any_model.path(2): lambda value: value * 0.5}):
        assert same(grad, _expected(any_model, inputs)[0])


def test_gradient_after_a_change_in_place(any_model):
    """A change in place between the value and the loss is differentiated, too."""
    inputs = any_model.inputs()

    def silence(value):
        value[..., ::2] = 0

    with any_model.model.trace(inputs):
        hidden = any_model.at(0).output
        silence(any_model.at(2).output)
        with _loss(any_model.head_envoy.output).backward():
            grad = hidden.grad.save()
    with changed(any_model.module, {any_model.path(2): silence}):
        assert same(grad, _expected(any_model, inputs, blocks=[0])[0])


def test_backward_leaves_the_model_as_it_was():
    """Parameters that require gradients collect none, and gradients are off in the next trace."""
    subject = make("llama")
    subject.module.requires_grad_(requires_grad=True)
    inputs = subject.inputs()
    with subject.model.trace(inputs):
        hidden = subject.at(1).output
        with _loss(subject.head_envoy.output).backward():
            grad = hidden.grad.save()
    assert grad.any()
    assert [name for name, p in subject.module.named_parameters() if p.grad is not None or not p.requires_grad] == []
    assert torch.is_grad_enabled()
    with subject.model.trace(inputs):
        plain = subject.at(1).output.save()
    assert not plain.requires_grad


def test_gradient_that_does_not_exist(any_model):
    """A value that the loss does not depend on has None, as in PyTorch; computing with it fails at the line that does."""
    inputs = any_model.inputs()
    with any_model.model.trace(inputs):
        early, late = any_model.at(0).output, any_model.at(3).output
        with any_model.at(1).output.sum().backward():
            there, missing = early.grad.sum().save(), late.grad.save()
    assert there.ndim == 0
    assert missing is None
    with pytest.raises(TypeError) as caught, any_model.model.trace(inputs):
        early, late = any_model.at(0).output, any_model.at(3).output
        with any_model.at(1).output.sum().backward():
            (early.grad.sum() * late.grad).save()
    assert "(early.grad.sum() * late.grad).save()" in str(caught.value)


class Interrupts(torch.autograd.Function):
    """The identity, whose backward is where the researcher presses Ctrl-C."""

    @staticmethod
    def forward(_context, value):
        return value.clone()

    @staticmethod
    def backward(_context, gradient):
        signal.raise_signal(signal.SIGINT)
        return gradient


@in_one_process("a signal to this process in a backward pass of it")
def test_no_hook_stays_after_ctrl_c_in_the_backward(any_model):
    """SIGINT in the middle of the backward pass comes out as KeyboardInterrupt, and the next trace is right."""
    inputs = any_model.inputs()
    interrupted = output_hook(any_model.module, any_model.path(2), lambda value, _call: Interrupts.apply(value))
    with interrupted, pytest.raises(KeyboardInterrupt), any_model.model.trace(inputs):
        hidden = any_model.at(1).output
        with _loss(any_model.head_envoy.output).backward():
            hidden.grad.save()
    assert hooks_of(any_model.module) == []
    with any_model.model.trace(inputs):
        logits = any_model.head_envoy.output.save()
    assert same(logits, any_model.logits(inputs))
    assert not logits.requires_grad
