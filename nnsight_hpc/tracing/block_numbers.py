"""Which values are plain numbers and strings of the block's own, chosen or counted where the graph runs: ``n += 1``.

Python keeps such a name without a word, so a block does, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nnsight_hpc.graph.build import CARRIED, FINAL, ITEM, LENGTH, LOOP, MERGE, NEXT, RANGE
from nnsight_hpc.graph.nodes import Ref

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nnsight_hpc.graph.nodes import Node

_PLAIN = (type(None), bool, int, float, complex, str)
_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
_OPERATORS = frozenset(
    f"operator.{name}" for name in (*_BINARY, *(f"i{name}" for name in _BINARY), "neg", "pos", "not_", "and_", "or_")
)


def is_number(nodes: Sequence[Node], number: int) -> bool:
    """Whether a node gives a plain number or string that is made of constants, lengths and passes of loops."""
    if _made_of(nodes, nodes[number]) is None:
        return False
    following: dict[int, list[Any]] = {}
    for node in nodes:
        if node.op == NEXT:
            following.setdefault(node.args[0].id, []).append(node.args[1])
    waiting: list[Any] = [Ref(number)]
    seen: set[int] = set()
    while waiting:
        item = waiting.pop()
        if type(item) is not Ref:
            if type(item) not in _PLAIN:
                return False
        elif item.id not in seen:
            seen.add(item.id)
            made_of = _made_of(nodes, nodes[item.id])
            if made_of is None:
                return False
            waiting += [*made_of, *following.get(item.id, ())]
    return True


def _made_of(nodes: Sequence[Node], node: Node) -> tuple[Any, ...] | None:
    """What a number is if this is one; None where the operation gives something else."""
    if node.op == LENGTH or (node.op == ITEM and _is_over_numbers(nodes, node)):
        return ()
    if node.op in (MERGE, CARRIED, FINAL):
        return node.args[1:]
    return node.args if node.op in _OPERATORS else None


def _is_over_numbers(nodes: Sequence[Node], item: Node) -> bool:
    loop = nodes[item.args[0].id]
    assert loop.op == LOOP, "validated: an item is a loop's"
    over = loop.args[0]
    return type(over) is Ref and nodes[over.id].op == RANGE
