"""What it takes to order a graph grows with its size, whatever its form; what takes long is refused or given up meanwhile."""

import contextlib
import itertools
import sys
import time

import pytest

from nnsight_hpc.execution.schedule import compile_graph
from nnsight_hpc.execution.structure import scheduled
from nnsight_hpc.graph import Graph, GraphBuilder, Ref, TensorRef, validate
from nnsight_hpc.graph.effort import effort, spend
from nnsight_hpc.graph.limits import MAX_WORK
from nnsight_hpc.wire.errors import InvalidGraph, RequestCancelled
from nnsight_hpc.wire.messages import ModelIdentity

X = TensorRef("x")


class _Builder(GraphBuilder):
    def __call__(self, op, *args, block=None, **kwargs):
        return Ref(self.append(op, args, kwargs, None, block))

    def read(self, where, path="0", **kwargs):
        return self("model.output", where, path, **kwargs)


def _invokes(b, n):
    forward = b("model.forward", X)
    for row in range(min(n, 4000)):
        b.read(b("model.invoke", forward, row, row + 1))


def _invokes_that_overlap(b, n):
    forward = b("model.forward", X)
    for row in range(min(n, 4000)):
        b.read(b("model.invoke", forward, 0, row + 1))


def _reads_of_many_invokes(b, n):
    forward = b("model.forward", X)
    parts = [b("model.invoke", forward, row, row + 1) for row in range(min(n // 4, 1000))]
    for number in range(n):
        b.read(parts[number * 7919 % len(parts)])


def _changes_of_many_invokes(b, n):
    forward = b("model.forward", X)
    for row in range(min(n // 2, 4000)):
        part = b("model.invoke", forward, row, row + 1)
        b("Tensor.add_", b.read(part), 1.0)


def _forwards_out_of_order(b, n):
    forwards = [b("model.forward", X) for _ in range(n // 4)]
    values = [b.read(forward) for forward in forwards]
    total = b("torch.stack", values[1:])
    for _ in range(n // 4):
        total = b("torch.neg", total)
    b("model.set_output", forwards[0], "2", total)


def _forwards_in_reverse(b, n):
    forwards = [b("model.forward", X) for _ in range(n // 4)]
    values = [b.read(forward) for forward in forwards]
    for forward, value in zip(forwards, values[1:], strict=False):
        b("model.set_output", forward, "2", value)


def _nested_loops(b, n):
    opened, block = [], None
    for _ in range(8):
        loop = b("control.loop", b("control.range", 1, block=block), block=block)
        opened.append((loop, block))
        block = loop.id
    value = b("torch.ones", 2, block=block)
    for _ in range(n // 2):
        value = b("torch.neg", value, block=block)
    for loop, outer in reversed(opened):
        b("control.end", loop, block=outer)


def _variables_of_a_loop(b, n):
    loop = b("control.loop", b("control.range", 2))
    for _ in range(n // 2):
        b("control.next", b("control.carried", loop, 0, block=loop.id), 1, block=loop.id)
    b("control.end", loop)


def _gradients(b, n):
    value = b.read(b("model.forward", X))
    loss = b("torch.sum", value)
    for _ in range(n // 2):
        b("grad.backward", loss)
    for _ in range(n // 2):
        b("grad.read", value)
    b("grad.backward", loss)


def _list_that_is_used(b, n):
    ones = [b("torch.ones", 2) for _ in range(n // 4)]
    b("container.list", *ones)
    b("Tensor.add_", ones[0], 1)
    for one in ones:
        b("torch.neg", one)


def _reads_and_changes(b, n):
    value = b.read(b("model.forward", X))
    for _ in range(n // 2):
        b("torch.neg", value)
        b("Tensor.add_", value, 1)


def _points_that_share_memory(b, n):
    forward = b("model.forward", X)
    reads = [b.read(forward, call=call, optional=True) for call in range(n)]
    b("torch.broadcast_tensors", *reads)
    for _ in range(n):
        b("Tensor.add_", reads[0], 1)


def _lists_of_lists(b, n):
    ones = [b("torch.ones", 2) for _ in range(n)]
    whole = b("container.list", *ones)
    b("Tensor.add_", ones[0], 1)
    for _ in range(n):
        b("operator.getitem", b("container.list", whole), 0)


def _loop_that_hands_out_shared_memory(b, n):
    ones = [b("torch.ones", 2) for _ in range(n)]
    b("torch.broadcast_tensors", *ones)
    loop = b("control.loop", b("control.range", 2))
    inside = [b("operator.pos", one, block=loop.id) for one in ones]
    end = b("control.end", loop)
    for value in inside:
        b("control.final", end, value)


LINEAR = (
    *(_invokes, _invokes_that_overlap, _reads_of_many_invokes, _changes_of_many_invokes, _forwards_out_of_order),
    *(_forwards_in_reverse, _nested_loops, _variables_of_a_loop, _gradients, _list_that_is_used),
)
ENTANGLED = (_points_that_share_memory, _lists_of_lists, _loop_that_hands_out_shared_memory)


def _graph(shape, size):
    builder = _Builder()
    shape(builder, size)
    graph = builder.build({}, ModelIdentity(id="m"))
    validate(graph)
    return graph


def _steps(shape, size):
    """How many instructions of Python it takes to order such a graph."""
    graph, count, before = _graph(shape, size), 0, sys.gettrace()

    def step(frame, event, _argument):
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return step

    sys.settrace(step)
    try:
        compile_graph(graph)
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("shape", LINEAR)
def test_four_times_the_graph_takes_about_four_times_as_long(shape):
    """Invokes, forwards, loops, gradients and changes are ordered in steps that grow with their number."""
    assert _steps(shape, 800) < 6 * _steps(shape, 200)


def test_changes_after_many_reads_are_ordered():
    """Thousands of changes of one value, each after a read of it, stay within the limit of work."""
    schedule = scheduled(_graph(_reads_and_changes, 8000), local=False)
    assert len(schedule.steps) == 8002


@pytest.mark.parametrize("shape", ENTANGLED)
def test_entangled_graph_is_refused(shape, monkeypatch):
    """What takes the square of its size is refused when it has taken too long."""
    monkeypatch.setattr("nnsight_hpc.graph.effort.MAX_WORK", 2_000_000)
    with pytest.raises(InvalidGraph, match="too entangled"):
        scheduled(_graph(shape, 2000), local=False)


@pytest.mark.parametrize("shape", [*LINEAR, *ENTANGLED, _reads_and_changes])
def test_cancel_is_seen_while_a_graph_is_read(shape):
    """Whoever does not want the answer any longer need not wait until a graph is read, checked and ordered."""
    document = _graph(shape, 600 if shape in ENTANGLED else 6000).to_json()
    asked = [time.thread_time()]

    def read(cancelled):
        with effort(cancelled):
            graph = Graph.from_json(document)
            validate(graph)
            compile_graph(graph)

    with contextlib.suppress(RequestCancelled):  # after twenty questions it is known how they come
        read(lambda: asked.append(time.thread_time()) or len(asked) > 20)
    asked.append(time.thread_time())
    assert max(after - before for before, after in itertools.pairwise(asked)) < 2
    with pytest.raises(RequestCancelled):
        read(lambda: True)


def test_work_is_bounded():
    """More than the limit is refused, with the limit; another effort begins anew."""
    for _ in range(2):
        with pytest.raises(InvalidGraph, match=f"more than {MAX_WORK} steps"), effort():
            for _ in range(1 + MAX_WORK // 100_000):
                spend(100_001)


def test_work_within_counts_with_what_is_around():
    """An effort in another has no limit of its own, and nobody else to ask."""
    with pytest.raises(RequestCancelled), effort(lambda: True):
        spend(60_000)
        with effort():
            spend(60_000)
