"""What the same block recorded the last time: a loop over prompts records the same nodes again and again.

A node that is as it was then is used again, and where all are, so is the whole tuple of nodes. What was worked out for it,
the schedule above all, is then found by identity.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nnsight_hpc.graph.nodes import Node, Ref

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import CodeType, FrameType

    from nnsight_hpc.graph.nodes import Source

    Site = tuple[CodeType, int]

_MOST = 256
_blocks: dict[Site, tuple[Node, ...]] = {}


class Recall:
    """The nodes that the block at `frame` recorded the last time."""

    def __init__(self, frame: FrameType) -> None:
        self._site: Site = (frame.f_code, frame.f_lasti)
        self._nodes = _blocks.get(self._site, ())

    def node(  # noqa: PLR0917 - those of a node, in its order
        self,
        number: int,
        op: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        source: Source,
        block: int | None,
    ) -> Node:
        """The node with that number and content: the one of the last time, if it was the same."""
        if number < len(self._nodes):
            old = self._nodes[number]
            same = old.op == op and old.source is source and old.block == block
            if same and _same(old.args, args) and _same(old.kwargs, kwargs):
                return old
        return Node(number, op, args, kwargs, source, block)

    def all(self, nodes: Sequence[Node]) -> tuple[Node, ...]:
        """`nodes` as a tuple: that of the last time, if they are the same; it is remembered for the next."""
        if len(nodes) != len(self._nodes) or any(a is not b for a, b in zip(nodes, self._nodes, strict=True)):
            if len(_blocks) >= _MOST:
                _blocks.clear()
            self._nodes = _blocks[self._site] = tuple(nodes)
        return self._nodes


def _same(a: Any, b: Any) -> bool:
    """Whether two arguments of nodes are the same to a graph: ``1``, ``1.0`` and ``True`` are not."""
    kind = type(a)
    if a is b:
        return True
    if kind is not type(b):
        return False
    if kind is Ref:
        return bool(a.id == b.id)
    if kind is tuple or kind is list:
        return len(a) == len(b) and all(map(_same, a, b))
    if kind is dict:
        return len(a) == len(b) and all(key in b and _same(item, b[key]) for key, item in a.items()) and [*a] == [*b]
    if kind is slice:
        return _same(a.start, b.start) and _same(a.stop, b.stop) and _same(a.step, b.step)
    if kind is float or kind is complex:
        return repr(a) == repr(b)
    return bool(a == b)
