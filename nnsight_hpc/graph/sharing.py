"""Which values may share memory, read off the graph: a view operation (`graph.operations.VIEWS`) shares with its
arguments, a module's point with whatever is set there; everything else is new. A container is memory of its own that holds
others' memory: to append to it changes the container, to change an entry of it in place changes what it holds.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import defaultdict
from functools import cached_property
from typing import TYPE_CHECKING

from nnsight_hpc.graph.build import APPEND, DICT, LIST, LOOP, MERGE, NEXT, READS, SET_GRAD
from nnsight_hpc.graph.effort import spend
from nnsight_hpc.graph.nodes import refs_in
from nnsight_hpc.graph.operations import FACTS, IN_PLACE, PROTOCOL, VIEWS
from nnsight_hpc.graph.points import SETTERS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from nnsight_hpc.graph.nodes import Graph, Node
    from nnsight_hpc.graph.points import Places, Point

_SHARE_ALL = VIEWS | {LOOP, MERGE, NEXT}
_CONTAINERS = frozenset({LIST, DICT})
_IN_A_STEP = 16
"""Entries of a set that are joined to another in a microsecond."""


class Memory:
    """A partition of the nodes by memory (union-find).

    Parameters
    ----------
    also
        For nodes whose sharing cannot be read off their operation: what they share with.
    """

    def __init__(self, graph: Graph, places: Places, also: Mapping[int, Iterable[int]]) -> None:
        self._parent = list(range(len(graph.nodes)))
        self._held: list[tuple[int, int]] = []  # container, what it holds
        self._closed: dict[int, frozenset[int]] = {}
        standing: dict[Point, _Standing] = defaultdict(_Standing)
        for node in graph.nodes:
            for ref in also[node.id] if node.id in also else _shares_with(node, graph):
                spend(1)
                self._join(ref, node.id)
            if point := places.points.get(node.id):
                for other in standing[point.place].add(places.rows.get(node.id), node.id):
                    self._join(other, node.id)
            self._held += [(node.id, ref) for ref in _holds(node, graph)]

    def with_held(self, node: int) -> frozenset[int]:
        """The memory of `node` and, where it may be a container, of all that it holds."""
        block = self(node)
        if block not in self._closed:
            found, waiting = {block}, [block]
            while waiting:
                new = self._held_by.get(waiting.pop(), set()) - found
                found |= new
                waiting += new
                spend(len(new))
            self._closed[block] = frozenset(found)
        closed = self._closed[block]
        spend(len(closed) // _IN_A_STEP)
        return closed

    @cached_property
    def _held_by(self) -> dict[int, set[int]]:
        """For the memory of each container, the memory that it holds directly."""
        found: dict[int, set[int]] = defaultdict(set)
        for container, held in self._held:
            found[self(container)].add(self(held))
        return found

    def __call__(self, node: int) -> int:
        """The name of the memory that the value of `node` may lie in."""
        while self._parent[node] != node:
            self._parent[node] = self._parent[self._parent[node]]
            node = self._parent[node]
        return node

    def _join(self, a: int, b: int) -> None:
        self._parent[self(b)] = self(a)


class _Standing:
    """Which rows of a batch the nodes at one place see: spans with no row in common, in order, and a node for each."""

    def __init__(self) -> None:
        self._starts: list[float] = []
        self._stops: list[float] = []
        self._nodes: list[int] = []

    def add(self, rows: tuple[int, int] | None, node: int) -> list[int]:
        """Let `node` see some rows (None: all); the nodes of the spans with which it has a row in common."""
        start, stop = rows or (-math.inf, math.inf)
        first = bisect_right(self._stops, start)
        last = bisect_left(self._starts, stop, first)
        joined = self._nodes[first:last]
        if joined:
            start, stop = min(start, self._starts[first]), max(stop, self._stops[last - 1])
        self._starts[first:last], self._stops[first:last], self._nodes[first:last] = [start], [stop], [node]
        return joined


def _shares_with(node: Node, graph: Graph) -> Iterable[int]:
    if node.op in _SHARE_ALL:
        return () if _is_fact(node, graph) else node.refs()
    if node.op in SETTERS:
        return refs_in(node.args[1 if node.op == SET_GRAD else 2])
    return refs_in(node.args[0]) if node.op in IN_PLACE else ()


def _is_fact(node: Node, graph: Graph) -> bool:
    """Whether a node asks a tensor for its shape or the like, no view of it. An entry of a dict may have such a name, too."""
    if node.op != "attribute" or node.args[1] not in FACTS:
        return False
    origin = graph.nodes[node.args[0].id]
    return origin.op in READS.values() or origin.op not in PROTOCOL


def _holds(node: Node, graph: Graph) -> Iterable[int]:
    if node.op in _CONTAINERS:
        return node.refs()
    return refs_in(node.args[1:]) if changes_container(node, graph) else ()


def changes_container(node: Node, graph: Graph) -> bool:
    """Whether an operation changes a list or dict, not what is in it."""
    made_here = node.op == "operator.setitem" and graph.nodes[node.args[0].id].op in _CONTAINERS
    return node.op == APPEND or made_here
