"""How a trace runs the model: it stops when nothing later is needed, leaves no hook, and frees what it is done with."""

import signal
import threading

import pytest
import torch
from torch import nn

from nnsight_hpc import NNsight
from tests.devices import DEVICE
from tests.oracle.architectures import make
from tests.oracle.compare import same
from tests.oracle.degrees import every_degree, in_one_process
from tests.oracle.hooks import Live, counting, forward_of, hooks_of, seeing


def _order(subject, inputs):
    with counting(subject.module) as ran:
        subject.run(inputs)
    return ran


def _until(order, path):
    return order[: order.index(path)]


@pytest.mark.parametrize("index", [0, 1, 2])
def test_stops_after_the_last_output_that_is_needed(any_model, index):
    """Exactly the modules that run before the next block begins are run."""
    inputs = any_model.inputs()
    with counting(any_model.module) as ran, any_model.model.trace(inputs):
        any_model.at(index).output.save()
        any_model.at(0).output.save()
    assert ran == _until(_order(any_model, inputs), any_model.path(index + 1))


def test_stops_before_a_module_whose_input_is_needed(any_model):
    """An input is known before the module runs, so the module does not run."""
    inputs = any_model.inputs()
    with counting(any_model.module) as ran, any_model.model.trace(inputs):
        any_model.at(2).input.save()
    assert ran == _until(_order(any_model, inputs), any_model.path(2))


def test_change_alone_stops_the_forward_too(any_model):
    """A change whose effect nobody reads does not need what comes later."""
    inputs = any_model.inputs()
    with counting(any_model.module) as ran, any_model.model.trace(inputs):
        any_model.at(1).output[:] = 0
        total = any_model.at(1).output.sum().save()
    assert total == 0
    assert ran == _until(_order(any_model, inputs), any_model.path(2))


@every_degree
def test_tracer_stop_ends_the_forward(any_model):
    """`tracer.stop()` runs nothing that comes after the last point above it."""
    inputs = any_model.inputs()
    with counting(any_model.module) as ran, any_model.model.trace(inputs) as tracer:
        value = any_model.at(1).output.save()
        tracer.stop()
    with seeing(any_model.module) as seen:
        any_model.run(inputs)
    assert same(value, seen.output(any_model.path(1)))
    assert ran == _until(_order(any_model, inputs), any_model.path(2))


def test_whole_output_runs_everything(any_model):
    """The model's own output needs every module."""
    inputs = any_model.inputs()
    with counting(any_model.module) as ran, any_model.model.trace(inputs):
        any_model.model.output.save()
    assert ran == _order(any_model, inputs)


@in_one_process("nothing is sent")
def test_nothing_asked_for_runs_nothing(any_model):
    """A trace that keeps and changes nothing does not run the model."""
    with counting(any_model.module) as ran, any_model.model.trace(any_model.inputs()):
        pass
    assert ran == []


@in_one_process("looks from inside of a forward of this process")
def test_only_touched_modules_have_hooks_while_the_model_runs(any_model):
    """Looked at from inside the forward, the modules with hooks are those that the trace names."""
    inputs, path, found = any_model.inputs(), any_model.path(1), []

    def look(forward, *args, **kwargs):
        found.append(hooks_of(any_model.module))
        return forward(*args, **kwargs)

    with forward_of(any_model.module, path, look), any_model.model.trace(inputs):
        any_model.at(0).output.save()
        any_model.at(3).output.save()
    assert found == [sorted({any_model.path(0), path, any_model.path(3)})]


def _error_in_the_model(subject):
    def fail(_forward, *_args, **_kwargs):
        raise ZeroDivisionError("in the model")

    with forward_of(subject.module, subject.path(2), fail), subject.model.trace(subject.inputs()):
        subject.at(1).output[:] = 0
        subject.head_envoy.output.save()


def _error_in_an_operation(subject):
    with subject.model.trace(subject.inputs()):
        subject.at(1).output.view(7, 7, 7).save()
        subject.head_envoy.output.save()


def _error_in_the_block(subject):
    with subject.model.trace(subject.inputs()):
        subject.at(1).output.save()
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("trace", "error"),
    [
        pytest.param(
            *(_error_in_the_model, ZeroDivisionError),
            marks=in_one_process("the researcher's own module is made to fail"),
        ),
        (_error_in_an_operation, RuntimeError),
        (_error_in_the_block, ZeroDivisionError),
    ],
)
def test_no_hook_stays_after_an_error(any_model, trace, error):
    """After an error of the model, of an operation or of the block the model is as before, and the next trace is right."""
    with pytest.raises(error):
        trace(any_model)
    assert hooks_of(any_model.module) == []
    inputs = any_model.inputs()
    with any_model.model.trace(inputs):
        logits = any_model.head_envoy.output.save()
    assert same(logits, any_model.logits(inputs))


@in_one_process("a signal to this process in a forward of it")
def test_no_hook_stays_after_ctrl_c(any_model):
    """SIGINT in the middle of the forward comes out as KeyboardInterrupt, with all hooks removed."""

    def interrupt(forward, *args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        return forward(*args, **kwargs)

    with (
        pytest.raises(KeyboardInterrupt),
        forward_of(any_model.module, any_model.path(2), interrupt),
        any_model.model.trace(any_model.inputs()),
    ):
        any_model.at(1).output[:] = 0
        any_model.at(1, "mlp").output.save()
        any_model.head_envoy.output.save()
    assert hooks_of(any_model.module) == []
    inputs = any_model.inputs()
    with any_model.model.trace(inputs):
        logits = any_model.head_envoy.output.save()
    assert same(logits, any_model.logits(inputs))


@in_one_process("about the researcher's own module")
def test_wrapping_and_tracing_change_nothing_of_the_module(any_model):
    """A wrapped model has no hook, no attribute and no class that it did not have, before and after a trace."""

    def state(module):
        return {name: (type(part), sorted(vars(part)), part.training) for name, part in module.named_modules()}

    fresh = make(any_model.name)
    assert state(any_model.module) == state(fresh.module)
    with any_model.model.trace(any_model.inputs()):
        any_model.at(1).output = any_model.at(0).output
        any_model.head_envoy.output.save()
    assert state(any_model.module) == state(fresh.module)
    assert all(same(a, b) for a, b in zip(any_model.module.parameters(), fresh.module.parameters(), strict=True))


@in_one_process("about hooks on the researcher's own module")
def test_other_hooks_of_the_user_stay(any_model):
    """Hooks that the researcher has on the module run as ever, and are still there afterwards."""
    calls, inputs = [], any_model.inputs()
    handle = any_model.module.get_submodule(any_model.path(1)).register_forward_hook(lambda *_: calls.append(1))
    try:
        with any_model.model.trace(inputs):
            any_model.at(1).output.save()
        assert calls == [1]
        assert hooks_of(any_model.module) == [any_model.path(1)]
    finally:
        handle.remove()


SIZE = 512
BIG = 4 * SIZE * SIZE


@pytest.fixture(scope="module")
def wide():
    """A module whose every value takes `BIG` bytes, and its input."""
    net = nn.Sequential(*(nn.Tanh() for _ in range(30)))
    return NNsight(net), torch.randn(SIZE, SIZE, device=DEVICE)


def test_chain_of_a_hundred_operations_holds_few_values(wide):
    """A chain holds at most the model's value, the constant, an argument and its result at a time."""
    model, x = wide
    with Live() as live, model.trace(x):
        value = model[0].output
        for _ in range(100):
            value = torch.cos(value) + 1
        value = value.save()
    expected = x.tanh()
    for _ in range(100):
        expected = torch.cos(expected) + 1
    assert same(value, expected)
    assert BIG < live.peak <= 5 * BIG


def test_reads_of_many_layers_are_dropped_after_their_last_use(wide):
    """Of thirty layers a number each is kept, and no layer's value outlives its use."""
    model, x, sums = *wide, []
    with Live() as live, model.trace(x):
        for layer in model:
            sums.append(layer.output.abs().mean().save())
    assert len(sums) == 30
    assert sums[0] == x.tanh().abs().mean()
    assert BIG < live.peak <= 6 * BIG


def test_long_lived_value_is_the_only_one_kept(wide):
    """A value that is used at the end is kept, the others beside it are not."""
    model, x = wide
    with Live() as live, model.trace(x):
        start = model[0].output * 1
        value = start
        for _ in range(50):
            value = value.sin()
        total = (start - value).sum().save()
    assert BIG < live.peak <= 6 * BIG
    expected = x.tanh()
    for _ in range(50):
        expected = expected.sin()
    assert total == (x.tanh() - expected).sum()


def test_two_threads_trace_one_model(llama):
    """Traces of two threads on the same model do not see each other's forward."""
    inputs = [llama.inputs(seed=seed, tokens=4 + seed) for seed in range(2)]
    expected = [llama.logits(each) for each in inputs]
    found = [[], []]

    def work(index):
        for _ in range(5):
            with llama.model.trace(inputs[index]):
                logits = llama.head_envoy.output.save()
            found[index].append(same(logits, expected[index]))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[True] * 5] * 2
