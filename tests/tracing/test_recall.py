"""A block that is recorded again: what is as the last time is used again, what differs is recorded, nothing is kept alive."""

import gc
import weakref
from contextlib import nullcontext, suppress

import pytest
import torch

from nnsight_hpc.wire.errors import InvalidGraph, InvalidInput


def _scaled(model, x, factor):
    with model.trace(x) as tracer:
        result = (torch.relu(model[0].output[:, -1] * factor) + x.sum()).save()
    return tracer.graph, result


def test_the_same_block_has_the_same_nodes(model, net, x):
    """With other tensors the second graph has the nodes of the first, and the results are those of the new tensors."""
    first, _ = _scaled(model, x, 2.0)
    second, result = _scaled(model, -x, 2.0)
    assert second.nodes is first.nodes
    assert torch.equal(result, torch.relu(net[0](-x)[:, -1] * 2.0) - x.sum())


def test_nodes_before_and_after_a_difference_are_the_same(model, x):
    """Where one constant differs, one node does."""
    first, _ = _scaled(model, x, 2.0)
    second, _ = _scaled(model, x, 3.0)
    different = [new.op for new, old in zip(second.nodes, first.nodes, strict=True) if new is not old]
    assert different == ["operator.mul"]


PAIRS = [(1, 1.0), (1, True), (0.0, -0.0), (1.0, 1 + 0j), (0j, -0j), (2, 3), ([1], (1,)), (slice(0, 1), slice(0, True))]


@pytest.mark.parametrize("pair", PAIRS, ids=repr)
@pytest.mark.parametrize("turn", [1, -1])
def test_constants_that_are_equal_are_not_the_same(model, x, pair, turn):
    """What Python takes for equal is told apart, as one argument, of several, and within one."""
    for constant in pair[::turn]:
        with model.trace(x) as tracer:
            tracer.list([constant])
            tracer.list([constant, {"key": (constant,)}])
        assert [repr(node.args) for node in tracer.graph.nodes if node.op == "container.list"] == [
            repr((constant,)),
            repr((constant, {"key": (constant,)})),
        ]


def test_another_value_in_the_same_place(model, x):
    """An operation of the same line on another value is another node."""
    for index in (0, 2):
        with model.trace(x) as tracer:
            both = model[0].output, model[1].output, model[2].output
            both[index].sum()
        assert tracer.graph.nodes[-1].args[0].id == index + 1


@pytest.mark.parametrize("where", ["block", "after"])
def test_gradients_have_the_same_nodes(model, x, where):
    """Also where a node gets its backward pass at the end of the block."""
    graphs = []
    for _ in range(2):
        with model.trace(x) as tracer:
            hidden = model[0].output
            loss = model.output.sum()
            if where == "block":
                with loss.backward():
                    grad = hidden.grad.save()
            else:
                loss.backward()
                grad = hidden.grad.save()
        graphs.append(tracer.graph)
        assert grad.shape == (3, 4)
    assert graphs[1].nodes is graphs[0].nodes


def test_invokes_sessions_and_edits_have_the_same_nodes(model, x):
    """So do blocks with several invokes, several traces, and edits."""
    with model.edit() as edited:
        edited[0].output[:] *= 2
    graphs = []
    for _ in range(2):
        with edited.session() as session:
            with edited.trace() as tracer:
                with tracer.invoke(x):
                    first = edited[1].output.save()
                with tracer.invoke(-x):
                    second = edited[1].output.save()
            with edited.trace(x):
                total = (first.sum() + second.sum() + edited[1].output.sum()).save()
        graphs.append(session.graph)
        assert total == 2 * first.sum() + second.sum()
    assert graphs[1].nodes is graphs[0].nodes


def test_a_value_of_a_failed_trace_is_refused(model, x):
    """Although the last time the same line was right: then the trace had not failed."""
    for raised in (None, KeyError):
        with model.session():
            with suppress(KeyError), model.trace(x):
                hidden = model[0].output
                _raise(raised)
            with model.trace(x), _refused(raised):
                hidden + 1


def _raise(error):
    if error:
        raise error


def _refused(error):
    return pytest.raises(InvalidInput, match="belongs to a trace whose block raised") if error else nullcontext()


def _increased(value):
    return value + 1


def test_after_a_block_nothing_is_recorded(model, x):
    """An operation that would come next in what the block recorded the last time is refused when the block is over."""
    for count in (3, 1):
        with model.trace(x) as tracer:
            value = model[0].output
            for _ in range(count):
                value = _increased(value)
        with pytest.raises(InvalidInput, match="the block that this value belongs to is over"):
            _increased(value)
        assert len(tracer.graph.nodes) == 2 + count


def test_nothing_grows(model, x):
    """A block run a thousand times with different tensors leaves no more objects than one run fifty times."""

    def run(times):
        for number in range(times):
            _scaled(model, x + number, 2.0)
        gc.collect()
        return len(gc.get_objects())

    before = run(50)
    assert run(1000) - before < 50


def test_nothing_of_a_block_is_kept_alive(model, x):
    """Its tensors and values, and objects that it was given and refused, are gone with the names that held them."""

    class Option:
        pass

    def run():
        tensor, option = x + 1, Option()
        with model.trace(tensor):
            hidden = model[0].output
            result = (hidden * tensor).save()
        with pytest.raises((InvalidGraph, TypeError)), model.trace(tensor, option):
            pass
        return [weakref.ref(each) for each in (tensor, result, option)]

    run()
    left = run()
    gc.collect()
    assert [reference() for reference in left] == [None, None, None]
