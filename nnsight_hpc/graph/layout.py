"""In which order and how far indented the nodes of a graph are written: blocks below what opens them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from nnsight_hpc.graph.build import ELSE, FORWARDS, IF, INVOKE, LOOP
from nnsight_hpc.graph.nodes import Ref

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from nnsight_hpc.graph.nodes import Graph, Node

_OPENERS = frozenset({IF, ELSE, LOOP})
_DEEPEST = 50


class Place(NamedTuple):
    """A node, how many blocks it stands in (forwards and invokes are blocks, too), and these forwards and invokes."""

    node: int
    depth: int
    inside: tuple[int, ...]


def well_formed(graph: Graph) -> bool:
    """Whether ids count up, references point back, and blocks are opened before and not nested too deeply."""
    depths: list[int] = []
    for index, node in enumerate(graph.nodes):
        opener = node.block
        if node.id != index or any(not 0 <= ref < index for ref in node.refs()):
            return False
        if opener is not None and not (0 <= opener < index and graph.nodes[opener].op in _OPENERS):
            return False
        depths.append(0 if opener is None else depths[opener] + 1)
        if depths[-1] > _DEEPEST:
            return False
    return all(0 <= save < len(graph.nodes) for save in graph.saves.values())


def layout(graph: Graph) -> list[Place]:
    """All nodes of a well-formed graph. What stands outside of a block but was recorded within comes before the block."""
    children: dict[int | None, list[Node]] = {}
    end = list(range(len(graph.nodes)))  # of each block, its last node
    for node in graph.nodes:
        children.setdefault(node.block, []).append(node)
        outer = node.block
        while outer is not None:
            end[outer] = node.id
            outer = graph.nodes[outer].block
    return list(_block(children, end, None, 0, ()))


def _block(
    children: dict[int | None, list[Node]], end: Sequence[int], block: int | None, depth: int, inside: tuple[int, ...]
) -> Iterator[Place]:
    for node in _hoisted(children.get(block, []), end):
        where = node.args[0].id if node.args and isinstance(node.args[0], Ref) else None
        if node.op in FORWARDS:
            inside = ()
        elif where in inside:
            inside = inside[: inside.index(where) + 1]
        yield Place(node.id, depth + len(inside), inside)
        if node.op in FORWARDS or node.op == INVOKE:
            inside = (*inside, node.id)
        elif node.op in _OPENERS:
            yield from _block(children, end, node.id, depth + 1, inside)


def _hoisted(nodes: Sequence[Node], end: Sequence[int]) -> list[Node]:
    """Sorted so that a block comes after all that was recorded while it was open."""
    ordered: list[Node] = []
    waiting: list[Node] = []
    for node in nodes:
        while waiting and end[waiting[-1].id] < node.id:
            ordered.append(waiting.pop())
        if end[node.id] > node.id:
            waiting.append(node)
        else:
            ordered.append(node)
    return ordered + waiting[::-1]
