"""Parts of a recording that are taken out: traces of a session whose block raised an error that the researcher caught."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nnsight_hpc.graph import Ref
from nnsight_hpc.graph.nodes import Node, map_leaves

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Pruned:
    """Ranges of node ids. They are left out when the graph is made, so that until then every value keeps its number."""

    def __init__(self) -> None:
        self._ranges: list[range] = []

    def add(self, start: int, stop: int) -> None:
        self._ranges.append(range(start, stop))

    def __bool__(self) -> bool:
        return bool(self._ranges)

    def __contains__(self, node: int) -> bool:
        return bool(self._ranges) and any(node in part for part in self._ranges)

    def apply(self, nodes: Sequence[Node]) -> tuple[list[Node], Callable[[int], int]]:
        """The nodes that are left, numbered anew, and what gives the new number of one."""
        left = [node for node in nodes if node.id not in self]
        numbers = {node.id: index for index, node in enumerate(left)}
        return [renumbered(node, numbers.__getitem__) for node in left], numbers.__getitem__


def renumbered(node: Node, number: Callable[[int], int]) -> Node:
    """The same node with other numbers for itself and the nodes that it refers to."""

    def leaf(value: Any) -> Any:
        return Ref(number(value.id)) if isinstance(value, Ref) else value

    block = None if node.block is None else number(node.block)
    args, kwargs = map_leaves((node.args, dict(node.kwargs)), leaf)
    return replace(node, id=number(node.id), args=args, kwargs=kwargs, block=block)
