"""The places and moments of a model that a graph touches: module inputs and outputs, skips, results, gradients."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from nnsight_hpc.graph.build import BACKWARD, INVOKE, KIND_OF, READ_GRAD, RESULT, SET_GRAD, SETS, SKIP
from nnsight_hpc.wire.errors import InvalidGraph

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nnsight_hpc.graph.nodes import Graph, Node

_KIND = KIND_OF | {SKIP: "skip", RESULT: "result"}
AT_A_MODULE = frozenset(_KIND)
"""Operations whose first argument says in which forward, or for which rows of it, they stand."""
SETTERS = frozenset({*SETS.values(), SKIP, SET_GRAD})
"""Operations that put a value in the place of what the model has."""


class Point(NamedTuple):
    """A place and moment of one forward, or of one backward: the input or output of one call of a module.

    For a gradient `forward` is the backward, and `module` the number of the node whose value it is the gradient of.
    """

    forward: int
    module: str
    kind: str
    call: int

    def __str__(self) -> str:
        if self.kind == "grad":
            return f"the gradient of node {self.module}"
        if self.kind == "result":
            return "the result of the forward"
        name = f"{self.module}.{self.kind}" if self.module else self.kind
        return f"{name} (call {self.call})" if self.call else name

    @property
    def place(self) -> Point:
        """The same for all points where one thing stands: what a module is given, or what it returns."""
        if self.kind == "result":
            return self._replace(kind="output")
        return self._replace(kind={"inputs": "input", "skip": "output"}.get(self.kind, self.kind))


@dataclass(frozen=True)
class Places:
    """Where each node of a graph stands.

    Attributes
    ----------
    points
        Of each node that reads or sets something of the model.
    rows
        Of nodes that see some rows of the batch only: from which row to before which.
    optional
        Nodes that are absent, and no error, when the model never comes to their point.
    """

    points: dict[int, Point]
    rows: dict[int, tuple[int, int]]
    optional: frozenset[int]


def places_of(graph: Graph, here: Sequence[int]) -> Places:
    """Where the nodes `here` of a validated graph stand; raises `InvalidGraph` for a gradient without a backward."""
    invokes = {node.id: node.args for node in graph.nodes if node.op == INVOKE}
    points: dict[int, Point] = {}
    rows: dict[int, tuple[int, int]] = {}
    nodes = [graph.nodes[number] for number in here]
    backwards = [node.id for node in nodes if node.op == BACKWARD]
    for node in nodes:
        if kind := _KIND.get(node.op):
            where = node.args[0].id
            if where in invokes:
                forward, *part = invokes[where]
                where, rows[node.id] = forward.id, (part[0], part[1])
            module = "" if node.op == RESULT else node.args[1]
            points[node.id] = Point(where, module, kind, node.kwargs.get("call", 0))
        elif node.op in (READ_GRAD, SET_GRAD):
            points[node.id] = Point(_backward_of(node, backwards), str(node.args[0].id), "grad", 0)
    optional = frozenset(node for node in points if graph.nodes[node].kwargs.get("optional"))
    return Places(points, rows, optional)


def _backward_of(node: Node, backwards: list[int]) -> int:
    """The backward that a gradient belongs to: the one that it names, or else the next in the program."""
    named = node.kwargs.get("backward")
    if named is not None:
        return int(named.id)
    following = bisect_right(backwards, node.id)
    if following < len(backwards):
        return backwards[following]
    raise InvalidGraph(
        "there is no backward pass for this gradient",
        where=str(node.source or f"node {node.id}"),
        next="call .backward() on the loss inside the block",
    )
