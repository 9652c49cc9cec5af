"""Python's own control flow on values: what the worker decides is what eager Python decides on the oracle's values."""
# ruff: noqa: SIM117 - blocks are written as researchers write them

import pytest
import torch

from nnsight_hpc.wire.errors import HpcError, InvalidInput
from tests.devices import DEVICE
from tests.oracle.compare import same
from tests.oracle.degrees import every_degree, in_one_process
from tests.oracle.hooks import changed, counting, seeing


def _seen(subject, inputs):
    with seeing(subject.module) as seen:
        subject.run(inputs)
    return seen


def _hidden(subject, index=1, seed=1):
    return _seen(subject, subject.inputs(seed=seed)).output(subject.path(index))


THRESHOLDS = (-1e9, 1e9)
"""A condition with the first is true, with the second false: every test runs both branches."""


@every_degree
@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_if_else(any_model, threshold):
    """A name assigned in both branches has the value of the branch that ran."""
    with any_model.model.trace(any_model.inputs()):
        hidden = any_model.at(1).output
        if hidden.sum() > threshold:
            result = hidden * 2
        else:
            result = hidden - 1
        result = result.save()
    expected = _hidden(any_model)
    assert same(result, expected * 2 if expected.sum() > threshold else expected - 1)


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_if_without_else_changes_the_model(any_model, threshold):
    """A change in a branch reaches the model only when the branch runs."""
    inputs, path = any_model.inputs(), any_model.path(1)
    with any_model.model.trace(inputs):
        hidden = any_model.at(1).output
        if hidden.sum() > threshold:
            any_model.at(1).output = hidden * -1
        logits = any_model.head_envoy.output.save()
    with changed(any_model.module, {path: lambda v: v * -1 if v.sum() > threshold else v}):
        assert same(logits, any_model.logits(inputs))


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_change_in_place_in_a_branch(any_model, threshold):
    """An in-place change in a branch reaches the model only when the branch runs, and reads after it see it."""
    inputs = any_model.inputs()

    def silence(value):
        if value.sum() > threshold:
            value[..., ::2] = 0
        else:
            value[..., 1::2] = 7

    with any_model.model.trace(inputs):
        hidden = any_model.at(1).output
        if hidden.sum() > threshold:
            hidden[..., ::2] = 0
        else:
            hidden[..., 1::2] = 7
        after = any_model.at(1).output.save()
        logits = any_model.head_envoy.output.save()
    expected = _hidden(any_model)
    silence(expected)
    assert same(after, expected)
    with changed(any_model.module, {any_model.path(1): silence}):
        assert same(logits, any_model.logits(inputs))


@pytest.mark.parametrize("first", THRESHOLDS)
@pytest.mark.parametrize("second", THRESHOLDS)
def test_elif_chain(llama, first, second):
    """Of `if`, `elif` and `else` exactly one runs."""
    with llama.model.trace(llama.inputs()):
        total = llama.at(1).output.sum()
        kind = torch.zeros(())
        if total > first:
            kind = kind + 1
        elif total > second:
            kind = kind + 2
        else:
            kind = kind + 3
        result = kind.save()
    assert result == (1 if first < 0 else 2 if second < 0 else 3)


@pytest.mark.parametrize("first", THRESHOLDS)
@pytest.mark.parametrize("second", THRESHOLDS)
def test_nested_conditions(llama, first, second):
    """Conditions inside branches, and names that only some branches assign."""
    with llama.model.trace(llama.inputs()):
        hidden = llama.at(1).output
        result = hidden
        if hidden.sum() > first:
            result = result + 1
            if hidden.mean() > second:
                result = result * 3
            result = result - 5
        result = result.save()
    expected = _hidden(llama)
    if first < 0:
        expected = (expected + 1) * 3 - 5 if second < 0 else expected + 1 - 5
    assert same(result, expected)


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_ternary_and_boolean_operators(llama, threshold):
    """`a if c else b`, `and`, `or` and `not` on values."""
    with llama.model.trace(llama.inputs()):
        hidden = llama.at(1).output
        large = hidden.sum() > threshold
        ternary = (hidden * 2 if large else hidden * 3).save()
        both = hidden * 0
        if large and hidden.abs().sum() > 0:
            both = both + 1
        if not large or hidden.abs().sum() < 0:
            both = both + 2
        both = both.save()
    expected = _hidden(llama)
    assert same(ternary, expected * (2 if threshold < 0 else 3))
    assert same(both, torch.full_like(expected, 1 if threshold < 0 else 2))


def test_chained_comparison(llama):
    """`a < v < b` on a value is both comparisons."""
    results = []
    expected = _hidden(llama).mean().item()
    for low, high in ((expected - 1, expected + 1), (expected + 1, expected + 2), (expected - 2, expected - 1)):
        with llama.model.trace(llama.inputs()):
            mean = llama.at(1).output.mean()
            inside = torch.zeros(())
            if low < mean < high:
                inside = inside + 1
            inside = inside.save()
        results.append(int(inside))
    assert results == [1, 0, 0]


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_tracer_cond(any_model, threshold):
    """`with tracer.cond(v) as c:` and `with c.else_():` run one of the two."""
    inputs = any_model.inputs()
    with any_model.model.trace(inputs) as tracer:
        hidden = any_model.at(1).output
        with tracer.cond(hidden.sum() > threshold) as condition:
            any_model.at(1).output = hidden * 2
        with condition.else_():
            any_model.at(1).output = hidden * 3
        logits = any_model.head_envoy.output.save()
    factor = 2 if threshold < 0 else 3
    with changed(any_model.module, {any_model.path(1): lambda value: value * factor}):
        assert same(logits, any_model.logits(inputs))


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_value_of_a_branch_that_did_not_run(llama, threshold):
    """A value that only one branch makes is there, or reading it says that its branch did not run."""
    with llama.model.trace(llama.inputs()):
        hidden = llama.at(1).output
        if hidden.sum() > threshold:
            made = (hidden * 2).save()
    if threshold < 0:
        assert same(made, _hidden(llama) * 2)
    else:
        with pytest.raises(InvalidInput, match="never made") as caught:
            _ = made + 1
        assert "if hidden.sum() > threshold" in str(caught.value)


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_branch_reads_points(any_model, threshold):
    """Points that are first read in a branch give what a read outside gives, also when read again after it."""
    inputs = any_model.inputs()
    with any_model.model.trace(inputs):
        result = any_model.at(0).output * 0
        if any_model.at(0).output.sum() > threshold:
            result = any_model.at(1).output + 0
        later = any_model.at(1).output.save()
        result = result.save()
    seen = _seen(any_model, inputs)
    assert same(later, seen.output(any_model.path(1)))
    expected = seen.output(any_model.path(1 if threshold < 0 else 0))
    assert same(result, expected if threshold < 0 else expected * 0)


def test_condition_over_invokes(any_model):
    """The same condition in several invokes is decided for each by its own rows."""
    batch = [any_model.inputs(seed=seed, rows=1) for seed in range(4)]
    means = [_seen(any_model, inputs).output(any_model.path(1)).mean().item() for inputs in batch]
    middle = sorted(means)[1] / 2 + sorted(means)[2] / 2
    results = []
    with any_model.model.trace() as tracer:
        for inputs in batch:
            with tracer.invoke(inputs):
                hidden = any_model.at(1).output
                if hidden.mean() > middle:
                    sign = hidden.mean() * 0 + 1
                else:
                    sign = hidden.mean() * 0 - 1
                results.append(sign.save())
    assert [int(each) for each in results] == [1 if mean > middle else -1 for mean in means]


@every_degree
def test_for_over_a_value(any_model):
    """`for row in value` goes over its first dimension."""
    inputs, rows = any_model.inputs(rows=3), []
    with any_model.model.trace(inputs):
        total = torch.zeros(())
        for row in any_model.at(1).output:
            total = total + row.max() * 2
            rows.append(row.min().save())
        total = total.save()
    hidden = _seen(any_model, inputs).output(any_model.path(1))
    expected = torch.zeros((), device=DEVICE)
    for row in hidden:
        expected = expected + row.max() * 2
    assert same(total, expected)
    assert same(rows, [row.min() for row in hidden])


def test_for_over_a_range(any_model):
    """`for i in range(n)` with arithmetic on a value that is carried on."""
    inputs = any_model.inputs()
    with any_model.model.trace(inputs):
        value = any_model.at(1).output
        for index in range(5):
            value = torch.sin(value) + index
        value = value.save()
    expected = _seen(any_model, inputs).output(any_model.path(1))
    for index in range(5):
        expected = torch.sin(expected) + index
    assert same(value, expected)


def test_for_over_a_range_of_a_value(llama):
    """The length of the range may come from the model."""
    with llama.model.trace(llama.inputs()):
        hidden = llama.at(1).output
        total = hidden[0, 0] * 0
        for index in range(hidden.shape[1]):
            total = total + hidden[0, index]
        total = total.save()
    expected = _hidden(llama)
    plain = expected[0, 0] * 0
    for index in range(expected.shape[1]):
        plain = plain + expected[0, index]
    assert same(total, plain)


def test_blocks_in_a_loop(any_model):
    """A loop over the model's blocks with changes in it is unrolled."""
    inputs = any_model.inputs()
    with any_model.model.trace(inputs):
        for index in range(4):
            if index % 2:
                continue
            any_model.at(index).output = any_model.at(index).output * (index + 2)
        logits = any_model.head_envoy.output.save()
    outputs = {any_model.path(i): lambda value, i=i: value * (i + 2) for i in (0, 2)}
    with changed(any_model.module, outputs):
        assert same(logits, any_model.logits(inputs))


def test_continue_on_a_value(llama):
    """`continue` under a condition on a value skips the rest of that pass only."""
    with llama.model.trace(llama.inputs(rows=6)):
        hidden = llama.at(1).output
        total = torch.zeros(())
        for row in hidden:
            if row.sum() < 0:
                continue
            total = total + row.max()
        total = total.save()
    rows = _seen(llama, llama.inputs(rows=6)).output(llama.path(1))
    assert {bool(row.sum() < 0) for row in rows} == {True, False}, "both paths are taken"
    assert same(total, sum((row.max() for row in rows if row.sum() >= 0), torch.zeros((), device=DEVICE)))


def test_condition_in_a_loop(llama):
    """An `if`/`else` inside a loop over a value is decided anew at each pass."""
    with llama.model.trace(llama.inputs(rows=6)):
        positive, negative = torch.zeros(()), torch.zeros(())
        for row in llama.at(1).output:
            if row.sum() > 0:
                positive = positive + row.sum()
            else:
                negative = negative + row.sum()
        positive, negative = positive.save(), negative.save()
    expected = [torch.zeros((), device=DEVICE), torch.zeros((), device=DEVICE)]
    for row in _seen(llama, llama.inputs(rows=6)).output(llama.path(1)):
        if row.sum() > 0:
            expected[0] = expected[0] + row.sum()
        else:
            expected[1] = expected[1] + row.sum()
    assert same([positive, negative], expected)


def test_nested_loops(llama):
    """A loop in a loop over values."""
    with llama.model.trace(llama.inputs()):
        total = torch.zeros(())
        for row in llama.at(1).output:
            for token in row:
                total = total * 0.5 + token[0]
        total = total.save()
    expected = torch.zeros((), device=DEVICE)
    for row in _hidden(llama):
        for token in row:
            expected = expected * 0.5 + token[0]
    assert same(total, expected)


def test_list_comprehension(any_model):
    """`[f(row) for row in value]` is a list with one entry for each row."""
    inputs = any_model.inputs(rows=3)
    with any_model.model.trace(inputs):
        hidden = any_model.at(1).output
        norms = torch.stack([row.norm() for row in hidden]).save()
    expected = torch.stack([row.norm() for row in _seen(any_model, inputs).output(any_model.path(1))])
    assert same(norms, expected)


def test_comprehension_with_a_condition(llama):
    """A comprehension's `if` on a value leaves out what does not hold."""
    with llama.model.trace(llama.inputs(rows=6)):
        hidden = llama.at(1).output
        sums = [row.sum() for row in hidden if row.sum() > 0].save()
    expected = [row.sum() for row in _seen(llama, llama.inputs(rows=6)).output(llama.path(1)) if row.sum() > 0]
    assert 0 < len(expected) < 6
    assert same(list(sums), expected)


def test_comprehension_over_blocks(any_model):
    """A comprehension over the model's own blocks gives a plain list of saved values."""
    inputs = any_model.inputs()
    with any_model.model.trace(inputs):
        states = [any_model.at(index).output.save() for index in range(4)]
    seen = _seen(any_model, inputs)
    assert same(states, [seen.output(any_model.path(index)) for index in range(4)])


def test_dict_comprehension_over_blocks(any_model):
    """A dict comprehension over blocks is a plain dict of saved values."""
    inputs = any_model.inputs()
    with any_model.model.trace(inputs):
        states = {index: any_model.at(index).output.sum().save() for index in range(4)}
    seen = _seen(any_model, inputs)
    assert same(states, {index: seen.output(any_model.path(index)).sum() for index in range(4)})


def test_plain_python_control_flow_stays_plain(any_model):
    """Conditions and loops on plain Python objects run while the block is recorded."""
    inputs, taken = any_model.inputs(), []
    with counting(any_model.module) as ran, any_model.model.trace(inputs):
        for index, name in enumerate(("a", "b")):
            if name == "b":
                taken.append(index)
                value = any_model.at(0).output.save()
            else:
                taken.append(name)
    assert taken == ["a", 1]
    assert same(value, _seen(any_model, inputs).output(any_model.path(0)))
    assert ran.count(any_model.path(1)) == 0


def test_while_on_a_value(llama):
    """A `while` on a value makes as many passes as plain Python."""
    with llama.model.trace(llama.inputs()):
        value, passes = llama.at(1).output, 0
        start = value.save()
        while value.abs().sum() > 1:
            value, passes = value * 0.5, passes + 1
        value = value.save()
    expected, count = start, 0
    while expected.abs().sum() > 1:
        expected, count = expected * 0.5, count + 1
    assert same(value, expected)
    assert passes == count > 1


@in_one_process("refused while it is recorded: nothing is sent")
def test_truth_where_no_source_is(llama):
    """In code without a source (exec), `if` on a value names `tracer.cond`."""
    code = compile("with model.trace(x):\n    if model.lm_head.output.sum() > 0:\n        pass\n", "<nowhere>", "exec")
    with pytest.raises(HpcError, match=r"tracer\.cond"):
        exec(code, {"model": llama.model, "x": llama.inputs()})


@in_one_process("refused while it is recorded: nothing is sent")
def test_loop_where_no_source_is(llama):
    """In code without a source, `for` over a value names `tracer.iter`."""
    code = compile("with model.trace(x):\n    for v in model.lm_head.output:\n        pass\n", "<nowhere>", "exec")
    with pytest.raises(HpcError, match=r"tracer\.iter|session\.iter"):
        exec(code, {"model": llama.model, "x": llama.inputs()})


def test_session_iter(any_model):
    """`for`-like loops over values on the worker: a trace in each pass."""
    inputs = torch.stack([any_model.inputs(seed=seed) for seed in range(3)])
    with any_model.model.session() as session:
        found = session.list().save()
        with session.iter(list(inputs)) as item:
            with any_model.model.trace(item):
                found.append(any_model.at(1).output.mean())
    expected = [_seen(any_model, each).output(any_model.path(1)).mean() for each in inputs]
    assert same(list(found), expected)


def test_session_iter_carries_a_value(any_model):
    """A value that is made before the loop and changed in it is the last pass's afterwards."""
    inputs = [any_model.inputs(seed=seed) for seed in range(3)]
    with any_model.model.session() as session:
        total = torch.zeros(())
        for item in session.iter(inputs):
            with any_model.model.trace(item):
                total = total + any_model.at(1).output.sum()
        total = total.save()
    expected = torch.zeros((), device=DEVICE)
    for each in inputs:
        expected = expected + _seen(any_model, each).output(any_model.path(1)).sum()
    assert same(total, expected)


def test_condition_skips_a_later_trace(any_model):
    """In a session, a trace in a branch that does not run does not run the model."""
    for threshold, forwards in zip(THRESHOLDS, (2, 1), strict=True):
        with counting(any_model.module) as ran, any_model.model.session():
            with any_model.model.trace(any_model.inputs()):
                total = any_model.at(1).output.sum().save()
            if total > threshold:
                with any_model.model.trace(any_model.inputs(seed=2)):
                    any_model.at(0).output.sum().save()
        assert ran.count(any_model.path(0)) == forwards


def test_helper_function_with_a_loop_is_called(llama):
    """A function of the researcher that is made of allowed operations is recorded through."""

    def smooth(value, times):
        for _ in range(times):
            value = (value + value.roll(1, -1)) / 2
        return value

    with llama.model.trace(llama.inputs()):
        result = smooth(llama.at(1).output, 3).save()
    assert same(result, smooth(_hidden(llama), 3))
