"""From a graph to the order in which its nodes may run, before any model is touched.

A node runs as soon as all that it waits for is there: the values that it uses, the point of the model that it reads or sets,
and, for memory that is changed in place, the reads and writes that come before it in the program. Independent nodes need no
order of their own, so an earlier layer may be written after a later one.

Whether two values share memory is not asked of torch but read off the graph: a view operation (`graph.operations.VIEWS`)
shares with its arguments, a module's point with whatever is set there, everything else is new.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from nnsight_hpc.graph.build import FORWARD, PARAMETER, READS, SAVE, SETS
from nnsight_hpc.graph.nodes import refs_in
from nnsight_hpc.graph.operations import IN_PLACE, VIEWS
from nnsight_hpc.wire.errors import InvalidGraph

if TYPE_CHECKING:
    from collections.abc import Iterable

    from nnsight_hpc.graph.nodes import Graph, Node

_KIND = {op: kind for table in (READS, SETS) for kind, op in table.items()}
SETTERS = frozenset(SETS.values())
_FACTS = frozenset({"shape", "dtype", "device", "ndim"})
"""Attributes of a tensor that are no views of it."""


class Point(NamedTuple):
    """A place and moment of one forward: the input or output of one call of a module."""

    forward: int
    module: str
    kind: str
    call: int


@dataclass(frozen=True)
class Schedule:
    """What the interleaver needs to know of a graph. All indices are node ids.

    Attributes
    ----------
    waits
        For each node, how many nodes it waits for (its point, if it has one, is one more).
    then
        For each node, those that wait for it.
    uses
        For each node, how many nodes use its value: at zero it is dropped.
    at
        For each point that the graph touches, its nodes in program order.
    due
        For each point, the nodes that must have run before the model goes on: sets, and changes in place.
    forwards
        The forward nodes in program order, each with its points.
    copies
        Saves of what the model itself holds: it may write there again, so they copy.
    """

    graph: Graph
    waits: tuple[int, ...]
    then: tuple[tuple[int, ...], ...]
    uses: tuple[int, ...]
    at: dict[Point, tuple[int, ...]]
    due: dict[Point, tuple[int, ...]]
    forwards: dict[int, tuple[Point, ...]]
    copies: frozenset[int]


def point_of(node: Node) -> Point | None:
    """The point that a node reads or sets, if it is that kind of node."""
    kind = _KIND.get(node.op)
    if kind is None:
        return None
    forward, module, *_ = node.args
    return Point(forward.id, module, kind, node.kwargs.get("call", 0))


def compile_graph(graph: Graph) -> Schedule:
    """The schedule of a validated graph; raises `InvalidGraph` where a parameter of the model would be changed."""
    memory = _Memory(graph)
    due, after = _due(graph, memory)
    edges = _edges(graph, memory, after)
    then: dict[int, list[int]] = defaultdict(list)
    for later, before in enumerate(edges):
        for earlier in before:
            then[earlier].append(later)
    at: dict[Point, list[int]] = defaultdict(list)
    for node in graph.nodes:
        if point := point_of(node):
            at[point].append(node.id)
    uses = [0] * len(graph.nodes)
    for node in graph.nodes:
        for ref in set(node.refs()):
            uses[ref] += 1
    forwards: dict[int, list[Point]] = {node.id: [] for node in graph.nodes if node.op == FORWARD}
    for point in at:
        forwards[point.forward].append(point)
    held = {memory(nodes[0]) for nodes in at.values()}
    return Schedule(
        graph=graph,
        waits=tuple(len(before) for before in edges),
        then=tuple(tuple(then[earlier]) for earlier in range(len(graph.nodes))),
        uses=tuple(uses),
        at={point: tuple(nodes) for point, nodes in at.items()},
        due=due,
        forwards={forward: tuple(points) for forward, points in forwards.items()},
        copies=frozenset(n.id for n in graph.nodes if n.op == SAVE and memory(n.args[0].id) in held),
    )


class _Memory:
    """Which values may share memory: a partition of the nodes (union-find), read off the graph."""

    def __init__(self, graph: Graph) -> None:
        self._parent = list(range(len(graph.nodes)))
        first_at: dict[Point, int] = {}
        for node in graph.nodes:
            for ref in self._shares_with(node):
                self._join(ref, node.id)
            if point := point_of(node):
                place = point._replace(kind="output" if point.kind == "output" else "input")
                self._join(first_at.setdefault(place, node.id), node.id)

    def __call__(self, node: int) -> int:
        """The name of the memory that the value of `node` may lie in."""
        while self._parent[node] != node:
            self._parent[node] = self._parent[self._parent[node]]
            node = self._parent[node]
        return node

    def _shares_with(self, node: Node) -> Iterable[int]:
        if node.op in VIEWS:
            return () if node.op == "attribute" and node.args[1] in _FACTS else node.refs()
        if node.op in SETTERS:
            return refs_in(node.args[2])
        return refs_in(node.args[0]) if node.op in IN_PLACE else ()

    def _join(self, a: int, b: int) -> None:
        self._parent[self(b)] = self(a)


def _changed(node: Node) -> int | None:
    """The node whose value this one changes in place."""
    return next(refs_in(node.args[0]), None) if node.op in IN_PLACE and node.args else None


def _edges(graph: Graph, memory: _Memory, after: dict[int, int]) -> list[set[int]]:
    """For each node the nodes that must run before it: what it uses, and the order of reads and writes of one memory.

    `after` has, for a change, the last forward that it must not disturb.
    """
    edges: list[set[int]] = []
    readers: dict[int, list[int]] = defaultdict(list)  # of each memory, since its last write
    writer: dict[int, int] = {}
    shared = {memory(target) for node in graph.nodes if (target := _changed(node)) is not None}
    for node in graph.nodes:
        before = set(node.refs())
        before -= {ref for ref in before if graph.nodes[ref].op == FORWARD}  # a point waits for its moment instead
        touched = {memory(ref) for ref in before} | ({memory(node.id)} if point_of(node) else set())
        target = _changed(node)
        for block in touched & shared:
            if block in writer:
                before.add(writer[block])
            if target is not None and block == memory(target):
                before.update(readers.pop(block, ()))
                writer[block] = node.id
            else:
                readers[block].append(node.id)
        before.discard(node.id)
        if node.id in after:
            before.add(after[node.id])
        edges.append(before)
    return edges


def _due(graph: Graph, memory: _Memory) -> tuple[dict[Point, tuple[int, ...]], dict[int, int]]:
    """What must have run before the model goes on from each point, and, for changes, the forward that must be over first.

    A change that a later trace makes to a value of an earlier one comes after the earlier forward, as it does in the program.
    """
    points: dict[int, dict[Point, None]] = defaultdict(dict)
    passed: dict[int, int] = {}  # of each memory the last forward that the program is past
    due: dict[Point, list[int]] = defaultdict(list)
    after: dict[int, int] = {}
    over = _over(graph)
    parameters = {memory(node.id) for node in graph.nodes if node.op == PARAMETER}
    for node in graph.nodes:
        if point := point_of(node):
            points[memory(node.id)][point] = None
            if node.op in SETTERS:
                due[point].append(node.id)
        if (target := _changed(node)) is not None:
            if memory(target) in parameters:
                raise changes_the_model(node)
            block = memory(target)
            for point in [p for p in points[block] if over[p.forward] <= node.id]:
                del points[block][point]
                passed[block] = max(point.forward, passed.get(block, point.forward))
            for point in points[block]:
                due[point].append(node.id)
            if block in passed:
                after[node.id] = passed[block]
    return {point: tuple(nodes) for point, nodes in due.items()}, after


def _over(graph: Graph) -> dict[int, int]:
    """For each forward the node from which on the program is past it: the first forward after all of its points."""
    last = {node.id: node.id for node in graph.nodes if node.op == FORWARD}
    starts = sorted(last)
    for node in graph.nodes:
        if point := point_of(node):
            last[point.forward] = node.id
    ends = [*starts, len(graph.nodes)]
    return {forward: ends[bisect_right(starts, node)] for forward, node in last.items()}


def changes_the_model(node: Node) -> InvalidGraph:
    """The refusal of a change in place of what all who use the model share."""
    return InvalidGraph(
        f"node {node.id} ({node.op}) would change a parameter of the model",
        where=str(node.source or ""),
        next="clone() the parameter, and change the copy",
    )
