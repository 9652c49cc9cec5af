"""Which values may share memory, read off the graph: a view operation (`graph.operations.VIEWS`) shares with its
arguments, a module's point with whatever is set there; everything else is new. A container is memory of its own that holds
others' memory: to append to it changes the container, to change an entry of it in place changes what it holds.
"""

from __future__ import annotations

from collections import defaultdict
from functools import cached_property
from typing import TYPE_CHECKING

from nnsight_hpc.execution.points import SETTERS
from nnsight_hpc.graph.build import APPEND, DICT, LIST, LOOP, MERGE, NEXT, READS, SET_GRAD
from nnsight_hpc.graph.limits import MAX_WORK
from nnsight_hpc.graph.nodes import refs_in
from nnsight_hpc.graph.operations import FACTS, IN_PLACE, PROTOCOL, VIEWS
from nnsight_hpc.wire.errors import InvalidGraph

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from nnsight_hpc.execution.points import Places, Point
    from nnsight_hpc.graph.nodes import Graph, Node

_SHARE_ALL = VIEWS | {LOOP, MERGE, NEXT}
_CONTAINERS = frozenset({LIST, DICT})


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
        self._work = 0
        standing: dict[Point, list[tuple[tuple[int, int] | None, int]]] = defaultdict(list)
        for node in graph.nodes:
            for ref in also[node.id] if node.id in also else _shares_with(node, graph):
                self._join(ref, node.id)
            if point := places.points.get(node.id):
                rows = places.rows.get(node.id)
                known = standing[point.place]
                for others, other in known:
                    if _overlap(rows, others):
                        self._join(other, node.id)
                if all(rows != others for others, _ in known):
                    known.append((rows, node.id))
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
            self._closed[block] = frozenset(found)
            self._work += len(found)
            if self._work > MAX_WORK:
                raise InvalidGraph("the graph is too entangled", why="too many lists and dicts that hold each other")
        return self._closed[block]

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


def _overlap(rows: tuple[int, int] | None, others: tuple[int, int] | None) -> bool:
    """Whether two parts of a batch have a row in common; None is the whole batch."""
    return rows is None or others is None or (rows[0] < others[1] and others[0] < rows[1])


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
