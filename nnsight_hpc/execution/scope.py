"""What all parts of a schedule are made from: a graph, which of its nodes run here, where they stand, what they share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nnsight_hpc.graph.build import FORWARDS

if TYPE_CHECKING:
    from nnsight_hpc.execution.loops import Loop
    from nnsight_hpc.graph.nodes import Graph, Node
    from nnsight_hpc.graph.points import Places, Point
    from nnsight_hpc.graph.sharing import Memory


@dataclass(frozen=True)
class Scope:
    """A graph as it is looked at.

    Attributes
    ----------
    here
        The nodes that run here, in program order; the bodies of loops are not among them.
    loops
        The loops by their last nodes.
    """

    graph: Graph
    here: tuple[int, ...]
    places: Places
    memory: Memory
    loops: dict[int, Loop]

    def node(self, number: int) -> Node:
        return self.graph.nodes[number]

    def point(self, number: int) -> Point | None:
        """Where a node stands, if it stands at a point."""
        return self.places.points.get(number)

    def having(self, *ops: str) -> list[int]:
        """The nodes here that have one of these operations."""
        return [number for number in self.here if self.graph.nodes[number].op in ops]

    def forwards(self) -> list[int]:
        return self.having(*FORWARDS)
