"""Several traces as one request, and containers that live on the worker."""
# ruff: noqa: C408, SIM117 - blocks are written as researchers write them

import pytest
import torch

from nnsight_hpc.wire.errors import InvalidGraph, InvalidInput
from tests.oracle.compare import same
from tests.oracle.degrees import every_degree, in_one_process
from tests.oracle.hooks import changed, counting, seeing


def _seen(subject, inputs):
    with seeing(subject.module) as seen:
        subject.run(inputs)
    return seen


@every_degree
def test_patching_from_an_earlier_trace(any_model):
    """A value of the first trace is put into the second, as a hook with the stored activation does."""
    clean, corrupt = any_model.inputs(seed=1), any_model.inputs(seed=2)
    with any_model.model.session():
        with any_model.model.trace(clean):
            hidden = any_model.at(2).output
        with any_model.model.trace(corrupt):
            any_model.at(2).output[..., -1, :] = hidden[..., -1, :]
            logits = any_model.head_envoy.output.save()
    source = _seen(any_model, clean).output(any_model.path(2))

    def patch(value):
        value[..., -1, :] = source[..., -1, :]

    with changed(any_model.module, {any_model.path(2): patch}):
        assert same(logits, any_model.logits(corrupt))


def test_later_layer_of_an_earlier_trace_for_an_earlier_layer(any_model):
    """Between traces the order of layers does not matter."""
    inputs = any_model.inputs()
    with any_model.model.session():
        with any_model.model.trace(inputs):
            late = any_model.at(3).output
        with any_model.model.trace(inputs):
            any_model.at(0).output = late
            logits = any_model.head_envoy.output.save()
    source = _seen(any_model, inputs).output(any_model.path(3))
    with changed(any_model.module, {any_model.path(0): lambda _value: source}):
        assert same(logits, any_model.logits(inputs))


def test_each_trace_of_a_session_stops_early(any_model):
    """Each forward of a session runs no further than it is needed."""
    with counting(any_model.module) as ran, any_model.model.session():
        with any_model.model.trace(any_model.inputs(seed=1)):
            first = any_model.at(0).output
        with any_model.model.trace(any_model.inputs(seed=2)):
            (any_model.at(1).output - first).save()
    counts = [ran.count(any_model.path(index)) for index in range(3)]
    assert counts == [2, 1, 0]


def test_session_with_all_layers_patched(any_model):
    """A loop of traces in a session: one patch each, against as many hooked forwards."""
    clean, corrupt, scores = any_model.inputs(seed=1), any_model.inputs(seed=2), []
    with any_model.model.session():
        with any_model.model.trace(clean):
            sources = [any_model.at(index).output for index in range(4)]
        for index in range(4):
            with any_model.model.trace(corrupt):
                any_model.at(index).output = sources[index]
                scores.append(any_model.head_envoy.output.sum().save())
    seen = _seen(any_model, clean)
    for index, score in enumerate(scores):
        with changed(any_model.module, {any_model.path(index): lambda _v, i=index: seen.output(any_model.path(i))}):
            assert same(score, any_model.logits(corrupt).sum())


def test_value_computed_between_traces(any_model):
    """What is computed in the session outside of a trace is part of the request."""
    inputs = any_model.inputs()
    with any_model.model.session():
        with any_model.model.trace(inputs):
            hidden = any_model.at(1).output
        direction = hidden.mean(0, keepdim=True)
        with any_model.model.trace(inputs):
            any_model.at(1).output = any_model.at(1).output - direction
            logits = any_model.head_envoy.output.save()
        direction = direction.save()
    expected = _seen(any_model, inputs).output(any_model.path(1)).mean(0, keepdim=True)
    assert same(direction, expected)
    with changed(any_model.module, {any_model.path(1): lambda value: value - expected}):
        assert same(logits, any_model.logits(inputs))


@every_degree
def test_gradients_in_a_session(any_model):
    """A steering step: the gradient of the first trace moves the activation in the second."""
    inputs = any_model.inputs()
    with any_model.model.session():
        with any_model.model.trace(inputs):
            hidden = any_model.at(1).output
            with any_model.head_envoy.output.log_softmax(-1)[..., 3].sum().backward():
                step = hidden.grad
        with any_model.model.trace(inputs):
            any_model.at(1).output = any_model.at(1).output + 0.5 * step
            after = any_model.head_envoy.output.log_softmax(-1)[..., 3].sum().save()
    before = any_model.logits(inputs).log_softmax(-1)[..., 3].sum()
    assert after > before


def test_value_of_another_session_must_be_saved(any_model):
    """A value that was not saved in an earlier request cannot be used in a later one."""
    with any_model.model.trace(any_model.inputs()):
        hidden = any_model.at(1).output
    with pytest.raises(InvalidInput, match="not saved"), any_model.model.trace(any_model.inputs()):
        any_model.at(2).output = hidden


def test_saved_value_of_an_earlier_trace_is_a_constant_of_the_next(any_model):
    """A saved activation is a tensor, and goes into a later trace as one."""
    clean, corrupt = any_model.inputs(seed=1), any_model.inputs(seed=2)
    with any_model.model.trace(clean):
        hidden = any_model.at(1).output.save()
    with any_model.model.trace(corrupt):
        any_model.at(1).output = hidden
        logits = any_model.head_envoy.output.save()
    with changed(any_model.module, {any_model.path(1): lambda _value: hidden}):
        assert same(logits, any_model.logits(corrupt))


def test_tracer_list_and_dict(any_model):
    """`tracer.list()` and `tracer.dict()` are filled on the worker and come back as Python's own."""
    inputs = any_model.inputs()
    with any_model.model.trace(inputs) as tracer:
        listed, named = tracer.list().save(), tracer.dict().save()
        for index in range(4):
            listed.append(any_model.at(index).output)
            named[f"block {index}"] = any_model.at(index).output.sum()
    seen = _seen(any_model, inputs)
    expected = [seen.output(any_model.path(index)) for index in range(4)]
    assert isinstance(listed, list)
    assert isinstance(named, dict)
    assert same(listed, expected)
    assert same(dict(named), {f"block {index}": value.sum() for index, value in enumerate(expected)})


def test_list_with_items_and_index(any_model):
    """A list made with items can be indexed and computed with in the block."""
    inputs = any_model.inputs()
    with any_model.model.trace(inputs) as tracer:
        pair = tracer.list([any_model.at(0).output, any_model.at(1).output])
        difference = (pair[1] - pair[0]).save()
    seen = _seen(any_model, inputs)
    assert same(difference, seen.output(any_model.path(1)) - seen.output(any_model.path(0)))


def test_saved_list_of_python(any_model):
    """`[…].save()` and `list().save()` in the block are lists on the worker."""
    inputs = any_model.inputs()
    with any_model.model.trace(inputs):
        display = [any_model.at(0).output, any_model.at(1).output.sum()].save()
        filled = list().save()
        filled.append(any_model.at(2).output)
        named = dict().save()
        named["a"] = any_model.at(2).output.mean()
    seen = _seen(any_model, inputs)
    outputs = [seen.output(any_model.path(index)) for index in range(3)]
    assert same(list(display), [outputs[0], outputs[1].sum()])
    assert same(list(filled), [outputs[2]])
    assert same(dict(named), {"a": outputs[2].mean()})


def test_log_and_print_show_values(any_model, capsys):
    """`tracer.log` and `print` of a value in a block show the value when the model has it."""
    inputs = any_model.inputs()
    with any_model.model.trace(inputs) as tracer:
        total = any_model.at(1).output.sum()
        tracer.log("the total is", total)
        print("mean", any_model.at(1).output.mean())
        print("plain")
    hidden = _seen(any_model, inputs).output(any_model.path(1))
    written = "".join(capsys.readouterr())
    assert "the total is" in written
    assert f"{hidden.sum().item():.4f}"[:6] in written
    assert f"{hidden.mean().item():.4f}"[:5] in written
    assert written.count("plain") == 1


@in_one_process("a Python function cannot be sent")
def test_apply_runs_a_python_function(any_model):
    """`tracer.apply` runs any Python function on the value, locally."""
    inputs, seen_shapes = any_model.inputs(), []

    def odd(value, scale):
        seen_shapes.append(tuple(value.shape))
        return torch.from_numpy(value.cpu().numpy() * scale).to(value.device)

    with any_model.model.trace(inputs) as tracer:
        any_model.at(1).output = tracer.apply(odd, any_model.at(1).output, scale=2)
        logits = any_model.head_envoy.output.save()
    assert seen_shapes == [tuple(_seen(any_model, inputs).output(any_model.path(1)).shape)]
    with changed(any_model.module, {any_model.path(1): lambda value: value * 2}):
        assert same(logits, any_model.logits(inputs))


@in_one_process("refused while it is recorded: nothing is sent")
def test_apply_is_refused_remotely_before_anything_is_sent(llama):
    """With `remote=True` a Python function is an error at its line, whether or not a cluster is there."""
    with pytest.raises((InvalidGraph, InvalidInput)) as caught:
        with llama.model.trace(llama.inputs(), remote=True) as tracer:
            tracer.apply(len, llama.at(1).output).save()
    assert "tracer.apply(len, llama.at(1).output).save()" in str(caught.value)


def test_stored_graph_runs_again(any_model):
    """A graph, after JSON, runs again on other inputs of the same form."""
    from nnsight_hpc import Graph

    first, second = any_model.inputs(seed=1), any_model.inputs(seed=2)
    with any_model.model.trace(first) as tracer:
        any_model.at(1).output *= 2
        logits = any_model.head_envoy.output.save()
    graph = Graph.from_json(tracer.graph.to_json())
    again = any_model.model.run(graph, second)["logits"]
    with changed(any_model.module, {any_model.path(1): lambda value: value * 2}):
        assert same(logits, any_model.logits(first))
        assert same(again, any_model.logits(second))
