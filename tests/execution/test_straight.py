"""What runs straight through at one stop: all that hangs on it alone."""

import pytest
import torch

from nnsight_hpc.execution import run_graph
from nnsight_hpc.execution.schedule import compile_graph
from nnsight_hpc.graph import Ref, TensorRef
from nnsight_hpc.graph.build import ELSE, IF, LOG, PARAMETER, SAVE
from nnsight_hpc.wire.errors import RequestCancelled


def _runs(builder):
    """The nodes that run straight through, by stop, in the order of the stops' first nodes."""
    return [[step.number for step in run] for run in compile_graph(builder.graph()).straight if run]


def test_chains_of_two_points(builder):
    """What hangs on one point each runs at that point, in program order."""
    first, second = (builder.add("model.output", Ref(0), path) for path in "02")
    double = builder.add("operator.mul", Ref(second), 2)
    saves = [builder.add(SAVE, Ref(value)) for value in (first, double)]
    assert _runs(builder) == [[first, saves[0]], [second, double, saves[1]]]


def test_reads_and_sets_at_one_point(builder):
    """A value that is changed and put back where it was read is one run."""
    value = builder.add("model.output", Ref(0), "0")
    more = builder.add("operator.add", Ref(value), TensorRef("v"))
    put = builder.add("model.set_output", Ref(0), "0", Ref(more))
    assert _runs(builder) == [[value, more, put]]


def _of_two_points(builder, value):
    builder.add("operator.add", Ref(value), Ref(builder.add("model.output", Ref(0), "3")))


def _with_what_comes_before(builder, value):
    builder.add("operator.matmul", Ref(value), Ref(builder.add(PARAMETER, "2", "weight")))


def _with_a_condition(builder, value):
    choice = builder.add(IF, Ref(builder.add("Tensor.any", Ref(value))))
    builder.add("operator.neg", Ref(value), block=choice)
    builder.add("operator.abs", Ref(value), block=builder.add(ELSE, Ref(choice)))


def _for_another_forward(builder, value):
    builder.add("model.forward", Ref(value))


def _changed_for_a_later_point(builder, value):
    later = builder.add("model.output", Ref(0), "1")
    builder.add("model.set_output", Ref(0), "1", Ref(value))
    builder.add("Tensor.mul_", Ref(later), 2)


NOT_ALONE = [
    _of_two_points,
    _with_what_comes_before,
    _with_a_condition,
    _for_another_forward,
    _changed_for_a_later_point,
]


@pytest.mark.parametrize("add", NOT_ALONE)
def test_what_does_not_stand_alone(builder, add):
    """Where something else is waited for, or waits, the order is found out while the graph runs."""
    add(builder, builder.add("model.output", Ref(0), "0"))
    assert _runs(builder) == []


def test_values_end_with_their_last_use(builder):
    """Each value is dropped after the last node that uses it, and at once where none does."""
    value = builder.add("model.output", Ref(0), "0")
    unused = builder.add("operator.neg", Ref(value))
    double = builder.add("operator.mul", Ref(value), 2)
    save = builder.add(SAVE, Ref(double))
    (run,) = filter(None, compile_graph(builder.graph()).straight)
    assert {step.number: set(step.ends) for step in run} == {
        value: set(),
        unused: {unused},
        double: {value},
        save: {double, save},
    }


def test_logs_of_one_point_are_in_program_order(net, x, builder):
    """Lines are logged in the order in which they are written."""
    value = builder.add("model.output", Ref(0), "0")
    for number in range(3):
        builder.add(LOG, number, Ref(builder.add("attribute", Ref(value), "ndim")))
    lines = []
    run_graph(builder.graph(), {"x": x}, net, log=lambda line, _source: lines.append(line))
    assert lines == ["0 2", "1 2", "2 2"]


def test_cancelled_between_the_nodes_of_one_point(net, x, builder):
    """A run that is cancelled is not run to the end of what hangs on a point."""
    value = builder.add("model.output", Ref(0), "0")
    for number in range(5):
        builder.add(LOG, number, Ref(value))
    lines = []
    with pytest.raises(RequestCancelled):
        run_graph(
            builder.graph(),
            {"x": x},
            net,
            cancelled=lambda: len(lines) == 2,
            log=lambda line, _source: lines.append(line[0]),
        )
    assert lines == ["0", "1"]


def test_after_a_branch_that_was_not_taken(net, x, builder):
    """In a graph with a conditional, what stands alone at another point runs all the same."""
    hidden = builder.add("model.output", Ref(0), "0")
    choice = builder.add(IF, False)
    builder.add(SAVE, Ref(hidden), block=choice)
    save = builder.add(SAVE, Ref(builder.add("operator.mul", Ref(builder.add("model.output", Ref(0), "2")), 2)))
    assert torch.equal(run_graph(builder.graph(s=save), {"x": x}, net)["s"], net[:3](x) * 2)
