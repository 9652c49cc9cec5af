"""Conditionals, loops and containers of a graph against the same in plain Python."""

import pytest
import torch

from nnsight_hpc.execution import run_graph
from nnsight_hpc.execution.values import Absent
from nnsight_hpc.graph import Ref
from nnsight_hpc.graph.build import (
    APPEND,
    CARRIED,
    CHECK,
    COLLECT,
    ELSE,
    END,
    FINAL,
    FORWARD,
    IF,
    ITEM,
    LEAVE,
    LENGTH,
    LIST,
    LOOP,
    MERGE,
    NEXT,
    RANGE,
    REACHED,
    SAVE,
)
from nnsight_hpc.graph.nodes import TensorRef


def condition(builder, value, sign):
    """A node that is true when `sign` is positive, known only while the model runs."""
    zero = builder.add("operator.mul", Ref(builder.add("Tensor.sum", Ref(value))), 0.0)
    return builder.add("operator.gt", Ref(builder.add("operator.add", Ref(zero), sign)), 0.0)


@pytest.mark.parametrize("sign", [1, -1])
def test_one_side_of_a_conditional_runs(net, x, builder, sign):
    """The taken side's set and value count; the other side's saved value is absent, and says which block was not run."""
    hidden = builder.add("model.output", Ref(0), "0")
    choice = builder.add(IF, Ref(condition(builder, hidden, sign)))
    double = builder.add("operator.mul", Ref(hidden), 2, block=choice)
    builder.add("model.set_output", Ref(0), "0", Ref(double), block=choice)
    other = builder.add(ELSE, Ref(choice))
    triple = builder.add("operator.mul", Ref(hidden), 3, block=other)
    merged = builder.add(MERGE, Ref(choice), Ref(double), Ref(triple))
    out = builder.add("model.output", Ref(0), "2")
    saves = {name: builder.add(SAVE, Ref(node_id)) for name, node_id in {"m": merged, "d": double, "out": out}.items()}
    got = run_graph(builder.graph(**saves), {"x": x}, net)
    plain = net[0](x)
    assert torch.equal(got["m"], plain * (2 if sign > 0 else 3))
    assert torch.equal(got["out"], net[2](net[1](plain * 2 if sign > 0 else plain)))
    assert isinstance(got["d"], torch.Tensor if sign > 0 else Absent)


def test_reads_that_nothing_needs_are_no_error_where_the_rest_was_optional(net, x, builder):
    """A point that never comes is no error when nothing is made of it, though what was wanted never came either."""
    save = builder.add(SAVE, Ref(builder.add("model.output", Ref(0), "4", call=1, optional=True)))
    builder.add("model.output", Ref(0), "2", call=1)
    assert isinstance(run_graph(builder.graph(s=save), {"x": x}, net)["s"], Absent)


def test_forward_is_left_where_only_an_untaken_branch_needs_more(net, x, builder):
    """A read of a later layer in a branch that is not taken does not make the model run on."""
    hidden = builder.add("model.output", Ref(0), "0")
    choice = builder.add(IF, Ref(condition(builder, hidden, -1)))
    late = builder.add("model.output", Ref(0), "2", block=choice)
    save = builder.add(SAVE, Ref(late), block=choice)
    ran = []
    handle = net[2].register_forward_pre_hook(lambda *_: ran.append(1))
    got = run_graph(builder.graph(s=save), {"x": x}, net)
    handle.remove()
    assert isinstance(got["s"], Absent)
    assert not ran


def test_change_with_a_value_that_was_never_made_is_an_error(net, x, builder):
    """Setting a module's output to a value of an untaken branch fails, and says why the value is not there."""
    hidden = builder.add("model.output", Ref(0), "0")
    choice = builder.add(IF, Ref(condition(builder, hidden, -1)))
    double = builder.add("operator.mul", Ref(hidden), 2, block=choice)
    builder.add("model.set_output", Ref(0), "0", Ref(double))
    with pytest.raises(ValueError, match="never made"):
        run_graph(builder.graph(), {"x": x}, net)


def test_loop_carries_collects_and_saves(net, x, builder):
    """A sum over rows is carried from pass to pass; values of all passes are collected; a save in a loop is a list."""
    hidden = builder.add("model.output", Ref(0), "0")
    loop = builder.add(LOOP, Ref(hidden))
    row = builder.add(ITEM, Ref(loop), block=loop)
    total = builder.add(CARRIED, Ref(loop), 0.0, block=loop)
    part = builder.add("Tensor.sum", Ref(row), block=loop)
    new = builder.add("operator.add", Ref(total), Ref(part), block=loop)
    saved = builder.add(SAVE, Ref(part), block=loop)
    builder.add(NEXT, Ref(total), Ref(new), block=loop)
    end = builder.add(END, Ref(loop))
    final = builder.add(FINAL, Ref(end), Ref(total))
    last = builder.add(FINAL, Ref(end), Ref(part))
    every = builder.add(COLLECT, Ref(end), Ref(part))
    saves = {name: builder.add(SAVE, Ref(node_id)) for name, node_id in {"f": final, "l": last, "e": every}.items()}
    got = run_graph(builder.graph(p=saved, **saves), {"x": x}, net)
    parts = [row.sum() for row in net[0](x)]
    assert torch.equal(got["f"], sum(parts, torch.tensor(0.0)))
    assert torch.equal(got["l"], parts[-1])
    assert all(torch.equal(a, b) for a, b in zip(got["e"], parts, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(got["p"], parts, strict=True))


def test_loop_without_a_pass(net, x, builder):
    """A carried variable keeps what it started from; what is made in the body only is absent."""
    loop = builder.add(LOOP, Ref(builder.add(RANGE, 0)))
    item = builder.add(ITEM, Ref(loop), block=loop)
    total = builder.add(CARRIED, Ref(loop), 7, block=loop)
    builder.add(NEXT, Ref(total), Ref(item), block=loop)
    end = builder.add(END, Ref(loop))
    ids = [builder.add(op, Ref(end), Ref(node_id)) for op, node_id in ((FINAL, total), (FINAL, item), (COLLECT, item))]
    got = run_graph(
        builder.graph(**{f"v{n}": builder.add(SAVE, Ref(node_id)) for n, node_id in enumerate(ids)}), {"x": x}, net
    )
    assert got["v0"] == 7
    assert isinstance(got["v1"], Absent)
    assert got["v2"] == []


def test_loop_changes_what_the_model_goes_on_with(net, x, builder):
    """Rows of a layer's output changed in a loop reach the next layer."""
    hidden = builder.add("model.output", Ref(0), "0")
    loop = builder.add(LOOP, Ref(hidden))
    row = builder.add(ITEM, Ref(loop), block=loop)
    builder.add("operator.setitem", Ref(row), 0, 5.0, block=loop)
    builder.add(END, Ref(loop))
    save = builder.add(SAVE, Ref(builder.add("model.output", Ref(0), "2")))
    got = run_graph(builder.graph(s=save), {"x": x}, net)
    changed = net[0](x)
    changed[:, 0] = 5.0
    assert torch.equal(got["s"], net[2](net[1](changed)))


def test_nested_loops_and_conditions(net, x, builder):
    """A loop in a loop with a condition inside appends to a list that lives outside of both."""
    found = builder.add(LIST)
    outer = builder.add(LOOP, Ref(builder.add(RANGE, 3)))
    i = builder.add(ITEM, Ref(outer), block=outer)
    inner = builder.add(LOOP, Ref(builder.add(RANGE, Ref(i), block=outer)), block=outer)
    j = builder.add(ITEM, Ref(inner), block=inner)
    choice = builder.add(IF, Ref(builder.add("operator.gt", Ref(j), 0, block=inner)), block=inner)
    pair = builder.add("operator.add", Ref(builder.add("operator.mul", Ref(i), 10, block=choice)), Ref(j), block=choice)
    builder.add(APPEND, Ref(found), Ref(pair), block=choice)
    seen = builder.add(SAVE, Ref(j), block=inner)
    builder.add(END, Ref(inner), block=outer)
    builder.add(END, Ref(outer))
    save = builder.add(SAVE, Ref(found))
    got = run_graph(builder.graph(s=save, j=seen), {"x": x}, net)
    assert got["s"] == [i * 10 + j for i in range(3) for j in range(i) if j > 0]
    assert got["j"] == [j for i in range(3) for j in range(i)]


def test_forwards_in_a_loop(net, x, builder):
    """A forward for each item: what it reads is saved once a pass."""
    inputs = builder.add(LIST, TensorRef("x"), TensorRef("y"))
    loop = builder.add(LOOP, Ref(inputs))
    forward = builder.add(FORWARD, Ref(builder.add(ITEM, Ref(loop), block=loop)), block=loop)
    save = builder.add(SAVE, Ref(builder.add("model.output", Ref(forward), "1", block=loop)), block=loop)
    builder.add(END, Ref(loop))
    y = torch.randn_like(x)
    got = run_graph(builder.graph(s=save), {"x": x, "y": y}, net)
    assert all(torch.equal(a, net[1](net[0](b))) for a, b in zip(got["s"], (x, y), strict=True))


def test_log_tells_text_and_the_users_line(net, x, builder):
    """Strings and values are joined as `print` does."""
    lines = []
    builder.add("log", "norm", Ref(builder.add("Tensor.numel", Ref(builder.add("model.output", Ref(0), "0")))))
    run_graph(builder.graph(), {"x": x}, net, log=lambda line, source: lines.append((line, source)))
    assert lines == [(f"norm {net[0](x).numel()}", "")]


@pytest.mark.parametrize("place", ["loop", "branch", "inner loop"])
def test_leave_makes_no_further_pass(net, x, builder, place):
    """The innermost loop ends with the pass in which the condition is true; what the pass gives counts."""
    hidden = builder.add("model.output", Ref(0), "0")
    outer = builder.add(LOOP, Ref(builder.add(RANGE, 2))) if place == "inner loop" else None
    loop = builder.add(LOOP, Ref(hidden), block=outer)
    row = builder.add(ITEM, Ref(loop), block=loop)
    count = builder.add(CARRIED, Ref(loop), 0, block=loop)
    more = builder.add("operator.add", Ref(count), 1, block=loop)
    builder.add(NEXT, Ref(count), Ref(more), block=loop)
    second = builder.add("operator.gt", Ref(more), 1, block=loop)
    inside = builder.add(IF, Ref(second), block=loop) if place == "branch" else loop
    builder.add(LEAVE, Ref(second), block=inside)
    kept = builder.add(SAVE, Ref(row), block=loop)
    end = builder.add(END, Ref(loop), block=outer)
    final = builder.add(FINAL, Ref(end), Ref(count), block=outer)
    counted = builder.add(SAVE, Ref(final), block=outer)
    if outer is not None:
        builder.add(END, Ref(outer))
    got = run_graph(builder.graph(count=counted, rows=kept), {"x": x}, net)
    repeated = 2 if outer is not None else 1
    assert got["count"] == ([2, 2] if outer is not None else 2)
    assert torch.equal(torch.stack(got["rows"]), net[0](x)[:2].repeat(repeated, 1))


def test_check_raises_with_its_message(net, x, builder):
    """A condition that is false is an error of the run; in a block that is not run it is none."""
    hidden = builder.add("model.output", Ref(0), "0")
    right = condition(builder, hidden, 1)
    wrong = condition(builder, hidden, -1)
    builder.add(CHECK, Ref(right), "no error")
    builder.add(CHECK, Ref(wrong), block=builder.add(IF, Ref(wrong)))
    run_graph(builder.graph(), {"x": x}, net)
    builder.add(CHECK, Ref(wrong), "the value is", 3)
    with pytest.raises(AssertionError, match="the value is 3"):
        run_graph(builder.graph(), {"x": x}, net)


def test_check_keeps_the_forward_going(net, x, builder):
    """What is checked is checked, although nothing is saved."""
    late = builder.add("model.output", Ref(0), "4")
    builder.add(CHECK, Ref(condition(builder, late, -1)), "late")
    with pytest.raises(AssertionError, match="late"):
        run_graph(builder.graph(), {"x": x}, net)


def test_reached_and_length(net, x, builder):
    """Whether the model came to a point, and how long a tensor or list is, are values."""
    here = builder.add("model.output", Ref(0), "2")
    never = builder.add("model.output", Ref(0), "2", call=1, optional=True)
    other = builder.add("operator.mul", Ref(never), 2)
    listed = builder.add(LIST, 1, 2, 3)
    builder.add(APPEND, Ref(listed), Ref(never))
    nodes = {"here": (REACHED, here), "never": (REACHED, never), "other": (REACHED, other)}
    nodes |= {"rows": (LENGTH, here), "entries": (LENGTH, listed)}
    saves = {name: builder.add(SAVE, Ref(builder.add(op, Ref(node)))) for name, (op, node) in nodes.items()}
    got = run_graph(builder.graph(**saves), {"x": x}, net)
    assert got == {"here": True, "never": False, "other": False, "rows": 3, "entries": 3}


def test_a_variable_that_begins_with_nothing(net, x, builder):
    """Is what the last pass that made it gave; where none did, it was never made."""
    hidden = builder.add("model.output", Ref(0), "0")
    nothing = builder.add(LIST, block=builder.add(IF, False))
    loop = builder.add(LOOP, Ref(hidden))
    row = builder.add(ITEM, Ref(loop), block=loop)
    variable = builder.add(CARRIED, Ref(loop), Ref(nothing), block=loop)
    choice = builder.add(IF, Ref(condition(builder, hidden, 1)), block=loop)
    builder.add(
        NEXT, Ref(variable), Ref(builder.add(MERGE, Ref(choice), Ref(row), Ref(variable), block=loop)), block=loop
    )
    never = builder.add(CARRIED, Ref(loop), Ref(nothing), block=loop)
    builder.add(NEXT, Ref(never), Ref(never), block=loop)
    end = builder.add(END, Ref(loop))
    saves = [builder.add(SAVE, Ref(builder.add(FINAL, Ref(end), Ref(node)))) for node in (variable, never)]
    got = run_graph(builder.graph(v=saves[0], n=saves[1]), {"x": x}, net)
    assert torch.equal(got["v"], net[0](x)[-1])
    assert isinstance(got["n"], Absent)
