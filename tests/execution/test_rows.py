"""Invokes, skips, calls in generation and results: what a part of a batch sees, and when."""

import pytest
import torch
from torch import nn

from nnsight_hpc.execution import run_graph
from nnsight_hpc.execution.rows import Common, Mixed, Part, Rows, by_size
from nnsight_hpc.execution.values import Absent
from nnsight_hpc.graph import Ref
from nnsight_hpc.graph.build import FORWARD, INVOKE, RESULT, SAVE, SKIP
from nnsight_hpc.graph.nodes import TensorRef


def test_rows_of_an_invoke(net, x, builder):
    """Each invoke reads and sets its own rows; the others' stay as they are."""
    first, second = (builder.add(INVOKE, Ref(0), start, start + 1) for start in (0, 1))
    read = builder.add("model.output", Ref(first), "0")
    builder.add("model.set_output", Ref(second), "0", Ref(read))
    saves = {
        name: builder.add(SAVE, Ref(builder.add("model.output", Ref(part), "2")))
        for name, part in {"a": first, "b": second, "all": 0}.items()
    }
    got = run_graph(builder.graph(**saves), {"x": x}, net)
    expected = net[2](net[1](torch.cat([net[0](x)[:1], net[0](x)[:1], net[0](x)[2:]])))
    assert torch.equal(got["all"], expected)
    assert torch.equal(got["a"], expected[:1])
    assert torch.equal(got["b"], expected[1:2])


def test_change_in_one_invoke_does_not_wait_for_another(net, x, builder):
    """A later read of one invoke's rows does not hold up a change of another's at the same layer."""
    first, second = (builder.add(INVOKE, Ref(0), start, start + 1) for start in (0, 1))
    early = builder.add("model.output", Ref(first), "0")
    late = builder.add("model.output", Ref(first), "2")
    difference = builder.add("operator.sub", Ref(late), Ref(early))
    builder.add("operator.setitem", Ref(builder.add("model.output", Ref(second), "0")), slice(None), 0.0)
    got = run_graph(builder.graph(d=builder.add(SAVE, Ref(difference))), {"x": x}, net)
    assert torch.allclose(got["d"], (net[:3](x) - net[0](x))[:1])


def test_rows_are_cut_by_batch_by_tokens_or_not_at_all():
    """Flattened tokens are cut by tokens, what is the same for all is copied, and anything else is refused."""
    rows = Rows(start=1, stop=2, batch=3, tokens=4)
    flat, shared = torch.arange(24.0).view(12, 2), torch.ones(1, 4)
    assert torch.equal(rows.cut(flat), flat[4:8])
    copy = rows.cut({"a": (shared,)})["a"][0]
    assert torch.equal(copy, shared)
    assert copy.data_ptr() != shared.data_ptr()
    with pytest.raises(ValueError, match=r"\[5, 2\] cannot be divided"):
        rows.cut(torch.zeros(5, 2))


@pytest.mark.parametrize(
    ("shape", "tokens", "expected"),
    [
        ((4, 7, 8), 7, Part(0, tokens=False)),
        ((28, 8), 7, Part(0, tokens=True)),
        ((4, 9), None, Part(0, tokens=False)),
        ((4,), 1, Part(0, tokens=False)),
        ((1, 7, 9), 7, Common()),
        ((4, 9), 7, Mixed),  # or four tokens, of an expert
        ((4, 7, 4), 7, Mixed),
        ((7, 4, 8), 7, Mixed),
        ((1, 7, 8), 7, Mixed),  # or heads of four prompts
        ((9, 8), 7, Mixed),
        ((), 7, Mixed),
    ],
)
def test_what_sizes_say_of_four_prompts(shape, tokens, expected):
    """Sizes alone decide only where they can be read in one way."""
    rule = by_size(shape, 4, tokens)
    assert isinstance(rule, Mixed) if expected is Mixed else rule == expected


def test_invoke_beyond_the_batch_is_refused(net, x, builder):
    """Rows that are not there are named."""
    part = builder.add(INVOKE, Ref(0), 0, 99)
    builder.add(SAVE, Ref(builder.add("model.output", Ref(part), "0")))
    with pytest.raises(ValueError, match="rows up to 99"):
        run_graph(builder.graph(), {"x": x}, net)


def test_module_is_skipped(net, x, builder):
    """A skipped module does not run, and its output is what was given; the module is as before afterwards."""
    value = builder.add("operator.mul", Ref(builder.add("model.input", Ref(0), "1")), 2)
    builder.add(SKIP, Ref(0), "1", Ref(value))
    save = builder.add(SAVE, Ref(builder.add(RESULT, Ref(0))))
    ran = []
    real = net[1].forward
    net[1].forward = lambda value: (ran.append(1), real(value))[1]
    got = run_graph(builder.graph(s=save), {"x": x}, net)
    assert not ran
    assert torch.equal(got["s"], net[2:](net[0](x) * 2))
    net(x)
    assert ran


def test_later_calls_of_a_module(x, builder):
    """`call` counts the calls of a module within one forward; one that never comes is absent where it may be."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(x.shape[1], x.shape[1])

        def forward(self, value):
            return self.inner(self.inner(value))

    twice = Twice().requires_grad_(requires_grad=False)
    saves = {
        f"c{call}": builder.add(SAVE, Ref(builder.add("model.output", Ref(0), "inner", call=call, optional=True)))
        for call in range(3)
    }
    got = run_graph(builder.graph(**saves), {"x": x}, twice)
    assert torch.equal(got["c1"], twice(x))
    assert isinstance(got["c2"], Absent)
    assert "call 2" in got["c2"].why


def test_forwards_run_in_the_order_that_they_need(net, x, builder):
    """A forward that comes first in the program but needs a value of the second runs after it."""
    other = builder.add(FORWARD, TensorRef("y"))
    value = builder.add("model.output", Ref(other), "0")
    builder.add("model.set_output", Ref(0), "0", Ref(value))
    save = builder.add(SAVE, Ref(builder.add("model.output", Ref(0), "2")))
    y = torch.randn_like(x)
    got = run_graph(builder.graph(s=save), {"x": x, "y": y}, net)
    assert torch.equal(got["s"], net[:3](y))


def test_forwards_that_need_each_other_are_refused(net, x, builder):
    """A circle is refused before the model runs."""
    other = builder.add(FORWARD, TensorRef("x"))
    mine, theirs = (builder.add("model.output", Ref(forward), "0") for forward in (0, other))
    builder.add("model.set_output", Ref(0), "1", Ref(theirs))
    builder.add("model.set_output", Ref(other), "1", Ref(mine))
    with pytest.raises(Exception, match="each need a value of the other"):
        run_graph(builder.graph(), {"x": x}, net)
