"""The forwards of a graph: in which order they run, what keeps each going, and what in one needs a value of elsewhere."""

from __future__ import annotations

import functools
import operator
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING

from nnsight_hpc.graph.build import APPLY, BACKWARD, CHECK, END, LOG, READS, SAVE
from nnsight_hpc.graph.effort import spend
from nnsight_hpc.wire.errors import InvalidGraph

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from nnsight_hpc.execution.scope import Scope
    from nnsight_hpc.graph.points import Point

_SEEN_OUTSIDE = frozenset({SAVE, LOG, CHECK, APPLY, BACKWARD, END})
_IN_A_FORWARD = frozenset({*READS, "skip"})
_BITS_IN_A_STEP = 10_000
_MOST_LOOKED_AT = 1_000_000
"""So many steps are taken when a graph is looked through for values of later layers; what is beyond the run finds out."""


def in_order(
    scope: Scope, points: Iterable[Point], due: Mapping[Point, tuple[int, ...]], edges: Mapping[int, set[int]]
) -> tuple[int, ...]:
    """The forwards in program order, but for those that need what a later one gives."""
    before = {forward: [forward] for forward in scope.forwards()}
    for point in points:
        if point.kind != "grad":
            before[point.forward] += due.get(point, ())
    latest: dict[int, int] = {}  # of each node the last forward, in program order, that it waits for
    for number in scope.here:
        latest[number] = max([_own_forward(scope, number), *(latest.get(ref, -1) for ref in edges[number])])
    if any(latest[number] > forward for forward, numbers in before.items() for number in numbers):
        return _sorted_forwards(scope, before, edges)
    return tuple(before)


def _own_forward(scope: Scope, number: int) -> int:
    point = scope.point(number)
    return point.forward if point and point.kind != "grad" else -1


def _sorted_forwards(scope: Scope, before: Mapping[int, list[int]], edges: Mapping[int, set[int]]) -> tuple[int, ...]:
    forwards = [*before]
    bits = {forward: 1 << place for place, forward in enumerate(forwards)}
    needed: dict[int, int] = {}  # of each node the forwards that it waits for, a bit each
    for number in scope.here:
        needed[number] = functools.reduce(
            operator.or_, (needed.get(ref, 0) for ref in edges[number]), bits.get(_own_forward(scope, number), 0)
        )
        spend((1 + len(edges[number])) * (1 + needed[number].bit_length() // _BITS_IN_A_STEP))
    waits: dict[int, list[int]] = {}
    for forward, numbers in before.items():
        wanted = functools.reduce(operator.or_, (needed[number] for number in numbers)) & ~bits[forward]
        waits[forward] = [other for other, bit in zip(forwards, f"{wanted:b}"[::-1], strict=False) if bit == "1"]
        spend(len(forwards) // 8 + 2 * len(waits[forward]))
    try:
        return tuple(TopologicalSorter(waits).static_order())
    except CycleError as error:
        one, other = (scope.node(number) for number in error.args[1][:2])
        raise InvalidGraph(
            "two forward passes each need a value of the other",
            where=str(one.source or f"node {one.id}"),
            why=f"the other one: {other.source or f'node {other.id}'}. Invokes of unequal length run one after the other",
            next="give the invokes prompts of one length, add `with tracer.invoke():`, which pads them into one forward, or "
            "use two traces",
        ) from None


def observed(scope: Scope, due: Mapping[Point, tuple[int, ...]], edges: Mapping[int, set[int]]) -> set[int]:
    """The nodes on which something depends that is seen outside, or what is done in another forward; all, where nothing is."""
    waiting = scope.having(*_SEEN_OUTSIDE)
    if not waiting:
        return set(scope.here)
    waiting += _for_other_forwards(scope, due, edges)
    seen = set(waiting)
    while waiting:
        new = edges[waiting.pop()] - seen
        seen |= new
        waiting += new
    return seen


def _for_other_forwards(scope: Scope, due: Mapping[Point, tuple[int, ...]], edges: Mapping[int, set[int]]) -> list[int]:
    """The nodes at points on which something depends that has to happen in another forward."""
    several = -1
    feeds = {
        forward: forward for forward in scope.forwards()
    }  # of each node, where something that depends on it happens
    for point, numbers in due.items():
        for number in numbers:
            feeds[number] = point.forward if feeds.get(number, point.forward) == point.forward else several
    for number in reversed(scope.here):
        for ref in edges[number] if number in feeds else ():
            feeds[ref] = feeds[number] if feeds.get(ref, feeds[number]) == feeds[number] else several
    return [number for number, forward in feeds.items() if (p := scope.point(number)) and p.forward != forward]


def crossings(
    scope: Scope, due: Mapping[Point, tuple[int, ...]], edges: Mapping[int, set[int]]
) -> Iterator[tuple[int, Point, Point]]:
    """What has to happen at one point and needs the value of another of the same forward: node, point, the other point."""
    left = _MOST_LOOKED_AT
    for point, numbers in due.items():
        for number in numbers if point.kind in _IN_A_FORWARD else ():
            waiting, seen = [number], {number}
            while waiting and left:
                left -= 1
                spend(5)
                one = waiting.pop()
                other = scope.point(one)
                if other and one != number and other.forward == point.forward and other.place != point.place:
                    yield number, point, other
                new = edges[one] - seen
                seen |= new
                waiting += new
