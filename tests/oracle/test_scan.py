"""`scan` and `validate`: shapes and dtypes in the block itself, against what a real run gives."""
# ruff: noqa: SIM117 - blocks are written as researchers write them

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from nnsight_hpc import LanguageModel, NNsight
from tests.oracle.architectures import WIDTH
from tests.oracle.compare import same
from tests.oracle.degrees import in_one_process
from tests.oracle.hooks import changed, seeing


@pytest.fixture
def real_work(monkeypatch):
    """The shapes of the real tensors that linear layers are given: empty while only fake ones are."""
    given, plain = [], nn.Linear.forward

    def forward(module, value):
        if not isinstance(value, FakeTensor):
            given.append(value.shape)
        return plain(module, value)

    monkeypatch.setattr(nn.Linear, "forward", forward)
    return given


def _seen(subject, inputs):
    with seeing(subject.module) as seen:
        subject.run(inputs)
    return seen


@in_one_process("a scan runs nothing, and nothing is sent")
def test_shapes_of_every_module(any_model, real_work):
    """Under `scan` the shape and dtype of each module's tensor output are real and right, and nothing is computed."""
    inputs = any_model.inputs()
    seen = _seen(any_model, inputs)
    paths = [p for p in dict.fromkeys(seen.order) if p and isinstance(seen.output(p), torch.Tensor)]
    found, computed = {}, len(real_work)
    with any_model.model.scan(inputs):
        for path in paths:
            value = any_model.model.get(path).output
            found[path] = (value.shape, value.dtype)
    assert len(real_work) == computed > 0
    assert found == {path: (seen.output(path).shape, seen.output(path).dtype) for path in paths}
    assert all(type(shape) is torch.Size for shape, _ in found.values())


@in_one_process("a scan runs nothing, and nothing is sent")
def test_shapes_can_be_computed_with(any_model):
    """A shape is a real `torch.Size` in the block: Python may branch and loop on it."""
    with any_model.model.scan(any_model.inputs(rows=3)):
        hidden = any_model.at(1).output
        rows, width = hidden.shape[0], hidden.shape[-1]
        doubled = torch.cat([hidden, hidden], -1).shape
        sizes = [each.shape[-1] for each in hidden.split(8, -1)]
    assert (rows, width, doubled[-1]) == (3, WIDTH, 2 * WIDTH)
    assert sizes == [8] * (WIDTH // 8)


@in_one_process("a scan runs nothing, and nothing is sent")
def test_wrong_operation_is_an_error_at_its_line(any_model, real_work):
    """Under `validate` a wrong index is raised while the block is recorded: nothing below it, and no model, runs."""
    reached = []
    with pytest.raises(IndexError) as caught:
        with any_model.model.trace(any_model.inputs(), scan=True, validate=True):
            hidden = any_model.at(1).output
            reached.append("above")
            hidden[99].save()
            reached.append("below")
    assert reached == ["above"]
    assert "hidden[99].save()" in str(caught.value)
    assert real_work == []


def test_validated_trace_runs(any_model):
    """A trace with `validate=True` gives what one without does, and shapes are real in it."""
    inputs = any_model.inputs()
    with any_model.model.trace(inputs, scan=True, validate=True):
        hidden = any_model.at(1).output
        shape = hidden.shape
        any_model.at(1).output = hidden * 2
        result = any_model.at(2).output.save()
    with changed(any_model.module, {any_model.path(1): lambda value: value * 2}):
        seen = _seen(any_model, inputs)
    assert shape == seen.output(any_model.path(1)).shape
    assert same(result, seen.output(any_model.path(2)))


@in_one_process("a scan runs nothing, and nothing is sent")
def test_without_weights(any_model):
    """A model on the meta device is scanned as well."""
    inputs = any_model.inputs()
    expected = _seen(any_model, inputs).output(any_model.path(2)).shape
    empty = any_model.architecture.make().eval().to("meta")
    model = LanguageModel(empty) if any_model.language else NNsight(empty)
    with model.scan(inputs):
        shape = model.get(any_model.path(2)).output.shape
    assert shape == expected
    assert all(parameter.is_meta for parameter in empty.parameters())


@in_one_process("a scan runs nothing, and nothing is sent")
def test_shapes_under_invokes(any_model):
    """In an invoke the shapes are those of its rows."""
    shapes = []
    with any_model.model.scan() as tracer:
        for rows in (1, 3):
            with tracer.invoke(any_model.inputs(rows=rows)):
                shapes.append(any_model.at(1).output.shape[0])
    assert shapes == [1, 3]


def test_scan_leaves_the_model_as_it_was(any_model):
    """After a scan a plain trace computes with the real weights."""
    inputs = any_model.inputs()
    with any_model.model.scan(inputs):
        _ = any_model.head_envoy.output.shape
    with any_model.model.trace(inputs):
        logits = any_model.head_envoy.output.save()
    assert same(logits, any_model.logits(inputs))
