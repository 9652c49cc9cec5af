"""Loops over values of known length, under scan and validate: Python runs them, an element at a time."""

# ruff: noqa: B007, B905 - how blocks are written

import pytest
import torch

from nnsight_hpc.graph.build import LOOP
from nnsight_hpc.tracing.block_unroll import MOST
from tests.tracing.programs import INPUTS, MODEL

HIDDEN = MODEL.module(INPUTS).detach()


def _loops(tracer):
    return sum(node.op == LOOP for node in tracer.graph.nodes)


def test_shapes_of_elements():
    """A comprehension over what `split` gives, a tensor's rows, or a list, is a list of Python's."""
    with MODEL.scan(INPUTS):
        h = MODEL[1].output
        sizes = [each.shape[-1] for each in h.split(3, -1)]
        rows = [tuple(row.shape) for row in h]
        entries = sum(entry.ndim + 1 for row in h for entry in row)
        halves = [(k, each.shape[-1]) for k, each in enumerate(h.chunk(2, -1))]
        seen = []
        for one, other in zip(h, h.split(1)):
            seen.append((one.ndim, other.ndim))
    assert (sizes, rows, entries, halves, seen) == ([3, 1], [(4,)] * 2, 8, [(0, 2), (1, 2)], [(1, 2)] * 2)


def test_validated_loop_runs():
    """An unrolled loop gives what it gives on tensors, with a `break` of Python's, saves, and no loop in the graph."""
    with MODEL.trace(INPUTS, validate=True) as tracer:
        h = MODEL[1].output
        total, kept = 0, []
        for index, row in enumerate(h, 1):
            total = total + row * index
            kept.append(row.save())
        for part in h.split(1, -1):
            first = (part * 2).save()
            break
        doubled = [(row * 2).save() for row in h]
        total = total.save()
    assert torch.equal(total, HIDDEN[0] + HIDDEN[1] * 2)
    assert torch.equal(torch.stack(kept), HIDDEN)
    assert torch.equal(torch.stack(doubled), HIDDEN * 2)
    assert torch.equal(first, HIDDEN[:, :1] * 2)
    assert _loops(tracer) == 0


@pytest.mark.parametrize("validate", [True, False])
def test_conditions_on_elements(validate):
    """What a value decides about an element is recorded: in a comprehension, a generator and a loop, known length or not."""
    with MODEL.trace(INPUTS, validate=validate):
        h = MODEL[1].output
        some = torch.stack([row for row in h if row[0] > 0]).save()
        total = sum(row.sum() for row in h if row[0] > 0).save()
        count = 0
        for row in h:
            if row[0] < 0:
                continue
            count = count + row[0]
        count = count.save()
    expected = HIDDEN[HIDDEN[:, 0] > 0]
    assert torch.equal(some, expected)
    assert torch.equal(total, expected.sum(-1).sum())
    assert torch.equal(count, expected[:, 0].sum())


def test_long_loops_stay_loops():
    """More than a thousand passes, of nested loops multiplied, are a loop of the graph; one that was left does not count."""
    with MODEL.trace(INPUTS, validate=True) as tracer:
        h = MODEL[1].output.flatten()
        for entry in h[:1].expand(MOST // 2):
            first = entry
            break
        long = 0
        for entry in h[:1].expand(MOST + 1):
            long = long + entry
        for part in h.split(4):
            for entry in part[:1].expand(MOST // 2 + 1):
                nested = entry * 2
        for part in h.split(4):
            for entry in part[:1].expand(3):
                short = entry * 2
        first, long, nested, short = first.save(), long.save(), nested.save(), short.save()
    assert torch.equal(first, HIDDEN[0, 0])
    torch.testing.assert_close(long, HIDDEN[0, 0] * (MOST + 1), rtol=1e-3, atol=0)
    assert torch.equal(nested, HIDDEN[1, 0] * 2)
    assert torch.equal(short, nested)
    assert _loops(tracer) == 3


@pytest.mark.parametrize("taken", [True, False])
def test_lengths_of_lists(taken):
    """Under validate a list that a branch may have filled has the length that the run gives; one that is known is Python's."""
    with MODEL.trace(INPUTS, validate=True) as tracer:
        h = MODEL[1].output
        known, filled = tracer.list([1, 2]), tracer.list([1])
        known.append(3)
        if h.sum() * 0 < (1 if taken else -1):
            filled.append(2)
        here, there = len(known), len(filled)
        rows = len(h)
        kept = (h[0, 0] * 0 + there).save()
    assert (here, rows, there, kept) == (3, 2, 2 if taken else 1, 2 if taken else 1)


def test_what_is_not_known_stays_a_loop():
    """A list that a branch fills, and a variable that grows in a loop of the graph, have no known length."""
    with MODEL.trace(INPUTS, validate=True):
        h = MODEL[1].output
        found = [h[0]]
        if h[0, 0] < 9:
            found.append(h[1])
        total = 0
        for row in found:
            total = total + row
        grown, entries = h[0, :1], 0
        for row in h.nonzero():
            grown = torch.cat([grown, grown[:1]])
            for entry in grown:
                entries = entries + entry / entry
        total, entries = total.save(), entries.save()
    passes = len(HIDDEN.nonzero())
    assert torch.equal(total, HIDDEN.sum(0))
    assert int(entries) == sum(range(2, passes + 2))
