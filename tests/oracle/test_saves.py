"""What `.save()` keeps: the value at that line, in memory of its own."""
# ruff: noqa: PERF401 - blocks are written as researchers write them

import pytest
import torch
from torch import nn

from nnsight_hpc import NNsight
from tests.devices import DEVICE
from tests.oracle.architectures import WIDTH
from tests.oracle.compare import same
from tests.oracle.hooks import counting, seeing


def _seen(subject, inputs):
    with seeing(subject.module) as seen:
        subject.run(inputs)
    return seen


@pytest.mark.parametrize("kind", ["output", "input"])
def test_saved_value_is_that_of_its_line(any_model, kind):
    """A value saved, changed in place and saved again is two values."""
    inputs = any_model.inputs()
    with any_model.model.trace(inputs):
        value = getattr(any_model.at(1), kind)
        before = value.save()
        value[..., 0] = 5
        middle = value.save()
        value *= 2
        after = value.save()
        any_model.head_envoy.output.save()
    seen = _seen(any_model, inputs)
    expected = getattr(seen, kind)(any_model.path(1))
    assert same(before, expected)
    expected[..., 0] = 5
    assert same(middle, expected)
    assert same(after, expected * 2)


def test_view_saved_before_its_base_is_changed(any_model):
    """A slice that is saved keeps what it was when the whole is changed later."""
    inputs = any_model.inputs()
    with any_model.model.trace(inputs):
        value = any_model.at(1).output
        row = value[0].save()
        transposed = value.transpose(0, -1).save()
        value[:] = 0
        any_model.head_envoy.output.save()
    expected = _seen(any_model, inputs).output(any_model.path(1))
    assert same(row, expected[0])
    assert same(transposed, expected.transpose(0, -1))


def test_change_through_a_view_after_the_save(any_model):
    """A change of a view of the saved value comes after the save."""
    inputs = any_model.inputs()
    with any_model.model.trace(inputs):
        value = any_model.at(1).output
        view = value.reshape(-1)
        saved = value.save()
        view[:] = 1
        changed_later = value.save()
        any_model.head_envoy.output.save()
    expected = _seen(any_model, inputs).output(any_model.path(1))
    assert same(saved, expected)
    assert same(changed_later, torch.ones_like(expected))


class Recycling(nn.Module):
    """Writes its result into one buffer of its own at each forward, as some caches do, and hands the buffer out."""

    def __init__(self):
        super().__init__()
        self.register_buffer("room", torch.zeros(2, 4, device=DEVICE))

    def forward(self, value):
        self.room.copy_(value * 2)
        return self.room


def test_saved_value_does_not_alias_a_buffer_of_the_model():
    """A value in memory that the model writes at its next forward stays what it was."""
    model = NNsight(nn.Sequential(nn.Identity(), Recycling(), nn.Identity()))
    x = torch.randn(2, 4, device=DEVICE)
    with model.trace(x):
        first = model[1].output.save()
        behind = model[2].output.save()
        row = model[1].output[0].save()
    with model.trace(-x):
        second = model[1].output.save()
    assert same(first, x * 2)
    assert same(behind, x * 2)
    assert same(row, x[0] * 2)
    assert same(second, -x * 2)


def test_saves_of_two_traces_of_a_session_do_not_alias():
    """The same for two forwards of one request."""
    model, x = NNsight(nn.Sequential(Recycling())), torch.randn(2, 4, device=DEVICE)
    with model.session():
        with model.trace(x):
            first = model[0].output.save()
        with model.trace(-x):
            second = model[0].output.save()
    assert same(first, x * 2)
    assert same(second, -x * 2)


def test_calls_of_a_recycling_module_do_not_alias():
    """A module that the researcher calls twice gives two values, though it has one buffer."""
    net = nn.Sequential(nn.Identity(), Recycling())
    model, x = NNsight(net), torch.randn(2, 4, device=DEVICE)
    with model.trace(x):
        hidden = model[0].output
        first = model[1](hidden)
        second = model[1](hidden * -1)
        difference = (first - second).save()
    assert same(difference, x * 4)


class AddsInPlace(nn.Module):
    """A residual block that adds to its input in place."""

    def __init__(self, width):
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, value):
        value += self.inner(value)
        return value


def test_residual_stream_that_the_model_changes_in_place():
    """Of a stream that each block adds to in place, a save keeps what stood at its point."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), *(AddsInPlace(4) for _ in range(3))).requires_grad_(requires_grad=False)
    net.to(DEVICE)
    model, x, states = NNsight(net), torch.randn(2, 4, device=DEVICE), []
    with model.trace(x):
        for layer in model:
            states.append(layer.output.save())
        entry = model[1].input.save()
    with seeing(net) as seen:
        net(x)
    assert same(states, [seen.output(str(index)) for index in range(4)])
    assert same(entry, seen.output("0"))


def test_unsaved_reads_of_a_stream_that_the_model_changes_in_place():
    """Arithmetic on a value of such a stream is done when the model is there."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), *(AddsInPlace(4) for _ in range(3))).requires_grad_(requires_grad=False)
    net.to(DEVICE)
    model, x = NNsight(net), torch.randn(2, 4, device=DEVICE)
    with model.trace(x):
        early = model[0].output * 1
        late = model[3].output * 1
        difference = (late - early).save()
    with seeing(net) as seen:
        net(x)
    assert same(difference, seen.output("3") - seen.output("0"))


def test_saved_values_are_plain_tensors_that_may_be_written(any_model):
    """A saved value is a `torch.Tensor` whose change touches neither the model nor another saved value."""
    inputs = any_model.inputs()
    with any_model.model.trace(inputs):
        one = any_model.at(1).output.save()
        other = any_model.at(1).output.save()
        following = any_model.at(2).input.save()
    expected = _seen(any_model, inputs).output(any_model.path(1))
    assert type(one) is torch.Tensor
    one.zero_()
    assert same(other, expected)
    assert same(following, expected)


def test_inputs_of_the_researcher_stay_as_they_were(any_model):
    """A trace that changes its first module's input in place does not change the caller's tensor."""
    inputs = any_model.inputs()
    before = inputs.clone()
    with any_model.model.trace(inputs):
        any_model.at(0).input[:] = 0
        any_model.head_envoy.output.save()
    assert same(inputs, before)
    net, x = NNsight(nn.Sequential(nn.Identity(), nn.ReLU(inplace=True))), -torch.ones(2, 2, device=DEVICE)
    with net.trace(x):
        net[0].input.mul_(3)
        out = net.output.save()
    assert same(x, -torch.ones(2, 2, device=DEVICE))
    assert not out.any()


def test_small_slice_does_not_keep_the_whole_alive(any_model):
    """A saved element holds its own few bytes, not the activation that it is a view of."""
    with any_model.model.trace(any_model.inputs(rows=4)):
        element = any_model.at(1).output[0, ..., :1].save()
    assert element.untyped_storage().nbytes() <= 2 * element.numel() * element.element_size()


def test_names_in_every_place_are_bound(any_model):
    """Names, lists, dicts, tuples and nested ones hold the tensors after the block."""
    inputs, nested = any_model.inputs(), {"a": [None, {}]}
    with counting(any_model.module) as ran, any_model.model.trace(inputs):
        name = any_model.at(1).output.save()
        nested["a"][0] = any_model.at(1).output.save()
        nested["a"][1]["deep"] = (any_model.at(1).output.save(), 3)
        first, *_rest = [any_model.at(1).output.save(), 1]
    expected = _seen(any_model, inputs).output(any_model.path(1))
    assert ran.count("") == 1
    assert same([name, nested["a"][0], nested["a"][1]["deep"][0], first], [expected] * 4)
    assert nested["a"][1]["deep"][1] == 3


def test_numbers_shapes_and_dtypes_are_saved(any_model):
    """Values that are no tensors come back as what they are in plain PyTorch."""
    inputs = any_model.inputs()
    with any_model.model.trace(inputs):
        hidden = any_model.at(1).output
        shape, dtype, number = hidden.shape.save(), hidden.dtype.save(), hidden.sum().item().save()
        width, pair = hidden.shape[-1].save(), hidden.topk(2).save()
    expected = _seen(any_model, inputs).output(any_model.path(1))
    assert (shape, dtype, width) == (expected.shape, torch.float32, WIDTH)
    assert any_model.ranks or isinstance(shape, torch.Size), "remote ones arrive as a tuple"
    assert same(number, expected.sum().item())
    assert same(tuple(pair), tuple(expected.topk(2)))
