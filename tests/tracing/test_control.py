"""Conditionals, loops and containers that are written as such, log lines, and Python functions."""

from types import SimpleNamespace

import pytest
import torch

from nnsight_hpc.wire.errors import InvalidInput


@pytest.mark.parametrize("threshold", [-1e9, 1e9])
def test_cond_takes_one_branch(model, net, x, threshold):
    """The branch that is not taken changes nothing, and what it saves says why it is not there."""
    with model.trace(x) as tracer:
        hidden = model[0].output
        with tracer.cond(hidden.sum() > threshold) as c:
            model[0].output = hidden * 2
            high = hidden.sum().save()
        with c.else_():
            model[0].output = hidden * 0
            low = hidden.sum().save()
        out = model.output.save()
    factor = 2 if threshold < 0 else 0
    made, absent = (high, low) if factor else (low, high)
    torch.testing.assert_close(out, net[1:](net[0](x) * factor))
    torch.testing.assert_close(made, net[0](x).sum())
    with pytest.raises(InvalidInput, match="never made") as caught:
        _ = absent + 1
    assert "was not run" in str(caught.value)


@pytest.mark.parametrize("threshold", [-1e9, 1e9])
def test_names_and_lists_in_cond(model, net, x, threshold):
    """What `cond` and `else_` bind, count and append is that of the one that was run, as with a plain `if`."""
    found, kinds, n, kind, scale = [], [], 0, "none", 5
    with model.trace(x) as tracer:
        h = model[0].output
        y = h
        with tracer.cond(h.sum() > threshold) as c:
            y, kind, n = h * 2, "high", n + 1
            found.append(h.save())
            kinds.append("high")
            scale = 3
        between = y + 1
        with c.else_():
            y = y * 3
            kind, n = "low", n + 10
            found.append((h + 1).save())
            kinds.append("low")
            found.append((h + 2).save())
        with tracer.cond(h.sum() > threshold):
            n += 100
        y, between, scaled = y.save(), between.save(), (h * scale).save()
    h = net[0](x)
    high = threshold < 0
    torch.testing.assert_close(y, h * 2 if high else h * 3)
    torch.testing.assert_close(between, (h * 2 if high else h) + 1)
    torch.testing.assert_close(scaled, h * (3 if high else 5))
    assert (kind, n, kinds) == (("high", 101, ["high"]) if high else ("low", 10, ["low"]))
    torch.testing.assert_close(found, [h] if high else [h + 1, h + 2])


def test_names_in_session_iter(model, net, x):
    """Names that a loop over a value binds go from pass to pass, those of a session, too; so do counters and lists."""
    total, n, sums, unsaved = 0, 0, [], []
    with model.session() as session:
        with model.trace(x):
            parts = model[1].output.split(1)
        for part in session.iter(parts):
            with model.trace(part):
                here = model.output.sum()
                total = total + here
                sums.append(here.save())
                unsaved.append(here)
            n += 1
        with session.iter(parts) as part:
            n += 10
        total = total.save()
    expected = [net(part).sum() for part in net[:2](x).split(1)]
    torch.testing.assert_close(total, sum(expected))
    torch.testing.assert_close(sums, expected)
    assert (n, len(unsaved)) == (33, 3)


WITHOUT_SOURCE = {
    "name": ("with tracer.cond(h.sum() > 0):\n        k = 2", "'k' is bound anew where a value decides(.|\n)*%%time"),
    "name in a loop": ("for row in session.iter(h):\n        k += 1", "'k' is bound anew"),
    "attribute": ("with tracer.cond(h.sum() > 0):\n        e.n = 1", "'e', a SimpleNamespace, is changed"),
    "list": ("with tracer.cond(h.sum() > 0):\n        items.append(3)", "'items', a list, is changed"),
    "unsaved": ("with tracer.cond(h.sum() > 0):\n        items.append(h)", "'items', a list, is changed"),
    "other side": (
        "with tracer.cond(h.sum() > 0) as c:\n        pass\n    with c.else_():\n        k = 3",
        "'k' is bound anew",
    ),
}


@pytest.mark.parametrize("name", WITHOUT_SOURCE)
def test_without_a_source(model, x, name):
    """Where the block cannot be rewritten, what would be wrong in silence is refused."""
    body, message = WITHOUT_SOURCE[name]
    names = {"model": model, "x": x, "e": SimpleNamespace(n=0)}
    start = "k, items = 1, []\nsession, tracer = model.session(), model.trace(x)\n"
    text = f"{start}with session, tracer:\n    h = model.output\n    {body}\n"
    with pytest.raises(InvalidInput, match=message):
        exec(compile(text, "<timed exec>", "exec"), names)


def test_cond_without_a_source(model, net, x):
    """There values can be bound and saved, and lists filled with saved values."""
    names = {"model": model, "x": x, "items": []}
    text = """
with model.trace(x) as tracer:
    h = model.output.sum()
    with tracer.cond(h < 1e9) as c:
        y = h.save()
        items.append(h.save())
    with c.else_():
        items.append((h * 2).save())
"""
    exec(compile(text, "<timed exec>", "exec"), names)
    assert (names["y"], names["items"]) == (net(x).sum(), [net(x).sum()])


def test_read_in_a_branch_is_not_used_outside(model, net, x):
    """A point that was first read in a branch that is not taken is read again after it."""
    with model.trace(x) as tracer:
        with tracer.cond(model[0].output.sum() > 1e9):
            model[1].output[:] = 0
        out = model[1].output.save()
    torch.testing.assert_close(out, net[:2](x))


def test_lists_and_dicts_of_the_worker(model, net, x):
    """Containers are filled in the block, and saved as they are at its end."""
    with model.trace(x) as tracer:
        states = tracer.list().save()
        named = tracer.dict({"in": model.input})
        for layer in model:
            states.append(layer.output)
        named["sum"] = states[0].sum() + states[-1].sum()
        states.extend([1, 2])
        named.save()
    torch.testing.assert_close(states[:3], [net[0](x), net[:2](x), net(x)])
    assert states[3:] == [1, 2]
    torch.testing.assert_close(named["sum"], net[0](x).sum() + net(x).sum())
    assert torch.equal(named["in"], x)


def test_session_iter_over_a_value(model, net, x):
    """The loop runs as often as the value has items, and traces stand in it."""
    totals = []
    with model.session() as session:
        with model.trace(x):
            parts = model[1].output.split(1)
        for part in session.iter(parts):
            with model.trace(part):
                total = model.output.sum().save()
                totals.append(total)
    expected = [net(part).sum() for part in net[:2](x).split(1)]
    torch.testing.assert_close(totals, expected)
    torch.testing.assert_close(total, expected[-1])


def test_session_iter_over_python_s_own_items_is_unrolled(model, net, x):
    """Items that are known here are items of Python."""
    found = {}
    with model.session() as session:
        for name in session.iter(["0", "1"]):
            with model.trace(x):
                found[name] = model.get(name).output.save()
    torch.testing.assert_close(found["1"], net[:2](x))
    assert list(found) == ["0", "1"]


def test_break_out_of_a_recorded_loop(model, net, x):
    """A loop over a value is left where Python leaves it; in a block without a source the error says so."""
    totals = []
    with model.session() as session:
        with model.trace(x):
            parts = model[1].output.split(1)
        for part in session.iter(parts):
            with model.trace(part):
                totals.append(model.output.sum().save())
            if totals[-1] == totals[0]:
                break
    torch.testing.assert_close(totals, [net(net[:2](x)[:1]).sum()])
    text = "with model.session() as s:\n    with model.trace(x):\n        h = model.output\n"
    text += "    for part in s.iter(h):\n        break\n"
    with pytest.raises(InvalidInput, match="left by `break` where its source cannot be read"):
        exec(compile(text, "<timed exec>", "exec"), {"model": model, "x": x})


def test_model_is_not_set_in_a_loop(model, x):
    """A point passes once, so that a loop over a value can read it and not set it."""
    with pytest.raises(InvalidInput, match="cannot be set in a loop"), model.session() as session, model.trace(x):
        for row in session.iter(model[0].output):
            model[1].output = row
    with model.session() as session, model.trace(x):
        sums = []
        for row in session.iter(model[0].output):
            scaled = row * model[2].weight.sum() + model[1].output.sum()
            sums.append(scaled.sum().save())
    assert len(sums) == 3


def test_log_prints_values(model, net, x, capsys):
    """A line with the values as they are then."""
    with model.trace(x) as tracer:
        tracer.log("sum", model.output.sum(), 3)
    printed = capsys.readouterr().out
    assert printed.startswith("sum ")
    assert f"{net(x).sum().item():.4f}"[:5] in printed
    assert printed.rstrip().endswith("3")


def test_apply_calls_a_python_function(model, net, x):
    """Any function of this process, with values of any kind as arguments."""
    seen = []

    def function(value, scale, *, shift):
        seen.append(type(value))
        return float(value.sum()) * scale + shift

    with model.trace(x) as tracer:
        result = tracer.apply(function, model[0].output, 2, shift=model.output.sum()).save()
    assert seen == [torch.Tensor]
    torch.testing.assert_close(result, net[0](x).sum() * 2 + net(x).sum())


def test_apply_is_refused_for_a_remote_trace(model, x):
    """A Python function is refused at its line, before there is any connection."""
    with pytest.raises(InvalidInput, match="cannot be sent") as caught, model.trace(x, remote=True) as tracer:
        tracer.apply(print, model.output)
    assert "tracer.apply(print, model.output)" in str(caught.value)


def test_error_caught_in_a_session_takes_its_trace_out(model, net, x):
    """What a failed trace recorded is not run, later traces are, and its values cannot be used."""
    with model.session() as session:
        with model.trace(x):
            first = model[0].output.sum().save()
        with pytest.raises(ZeroDivisionError), model.trace(x):
            lost = model[0].output.save()
            _ = 1 / 0
        with pytest.raises(InvalidInput, match="raised an error"), model.trace(x):
            model[0].output[:] = lost
        with model.trace(x):
            last = (model.output.sum() + first).save()
    assert sum(node.op == "model.forward" for node in session.graph.nodes) == 2
    torch.testing.assert_close(last, net(x).sum() + net[0](x).sum())
    torch.testing.assert_close(first, net[0](x).sum())


def test_unpacking_into_names(model, net, x):
    """A line that unpacks says how many there are."""
    with model.trace(x):
        values, indices = model.output.topk(1)
        rows, width = model.output.shape
        values, indices, total = values.save(), indices.save(), (rows * width).save()
    assert torch.equal(values, net(x).topk(1).values)
    assert torch.equal(indices, net(x).topk(1).indices)
    assert total == 6


def test_what_cannot_be_recorded_as_an_argument(model, x):
    """An object that no graph can hold is refused at its line."""
    with pytest.raises(InvalidInput, match="type object cannot be recorded"), model.trace(x):
        model.output.add(object())
