"""The blocks of a graph, conditionals and loops: where each node stands, and what may be used where."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nnsight_hpc.graph.build import (
    BACKWARD,
    CARRIED,
    COLLECT,
    ELSE,
    END,
    FINAL,
    IF,
    INVOKE,
    ITEM,
    LEAVE,
    LOOP,
    MERGE,
    NEXT,
    READ_GRAD,
    READS,
    RESULT,
    SET_GRAD,
    SETS,
    SKIP,
)
from nnsight_hpc.graph.limits import MAX_BLOCK_DEPTH
from nnsight_hpc.graph.nodes import Ref

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nnsight_hpc.graph.nodes import Node

_OPENS = frozenset({IF, ELSE, LOOP})
_AT_START = frozenset({ITEM, CARRIED})
_IN_A_PASS = frozenset({*READS.values(), *SETS.values(), SKIP, RESULT, INVOKE, READ_GRAD, SET_GRAD, BACKWARD})
"""What must stand in the same loop as the forward, or the value, that it belongs to."""


class Blocks:
    """The blocks of the nodes seen so far."""

    def __init__(self) -> None:
        self._nodes: list[Node] = []
        self._around: list[tuple[int, ...]] = []  # of each node the blocks around it, from the innermost out
        self._ends: dict[int, int] = {}

    def op(self, node: int) -> str:
        return self._nodes[node].op

    def add(self, node: Node) -> None:
        """Take in a node, in program order."""
        block = node.block
        known = block is not None and 0 <= block < len(self._nodes)
        around = (block, *self._around[block]) if known and block is not None else ()
        self._around.append(around[: MAX_BLOCK_DEPTH + 1])
        self._nodes.append(node)
        if node.op == END and node.args and isinstance(node.args[0], Ref):
            self._ends[node.args[0].id] = node.id

    def problems(self, node: Node) -> Iterator[str]:
        """What is wrong with where `node` stands and with what it uses from there; its form is right."""
        if node.block is not None and not (0 <= node.block < len(self._nodes) and self.op(node.block) in _OPENS):
            yield f"stands in the block of node {node.block}, which opens none before it"
            return
        around = () if node.block is None else (node.block, *self._around[node.block])
        if len(around) > MAX_BLOCK_DEPTH:
            yield f"stands in more than {MAX_BLOCK_DEPTH} blocks"
        loops = self._loops(around)
        yield from (f"stands in the loop of node {loop}, which is over" for loop in loops if loop in self._ends)
        if node.op == LEAVE and not loops:
            yield "stands in no loop that it could end"
        yield from self._control(node)
        if node.op in (FINAL, COLLECT):
            return
        for ref in node.refs():
            missing = [loop for loop in self._loops(self._around[ref]) if loop not in loops]
            if missing:
                yield f"uses node {ref} from outside of its loop; control.final and control.collect hand values out"
            elif node.op in _IN_A_PASS and self._loops(self._around[ref]) != loops and ref == next(node.refs()):
                yield f"stands in a loop that node {ref}, to which it belongs, is not in"

    def unfinished(self) -> Iterator[str]:
        """What is wrong with the graph as a whole."""
        for node in self._nodes:
            if node.op == LOOP and node.id not in self._ends:
                yield f"the loop of node {node.id} has no end"

    def _loops(self, around: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(block for block in around if self.op(block) == LOOP)

    def _control(self, node: Node) -> Iterator[str]:
        """Whether the parts of a conditional or loop stand where they belong."""
        if node.op in (ELSE, MERGE, END, FINAL, COLLECT):
            opener = self._nodes[node.args[0].id]
            if opener.block != node.block:
                yield f"does not stand in the same block as node {opener.id}"
        if node.op == END and node.args[0].id in self._ends:
            yield f"ends the loop of node {node.args[0].id} a second time"
        if node.op in _AT_START and node.block != node.args[0].id:
            yield f"does not stand in the loop of node {node.args[0].id}"
        if node.op == NEXT and self._nodes[node.args[0].id].args[0].id not in (node.block, None):
            yield "does not stand in the loop of its variable"
        if node.op in (FINAL, COLLECT):
            loop = self._nodes[node.args[0].id].args[0].id
            if self._loops(self._around[node.args[1].id])[:1] != (loop,):
                yield f"hands out node {node.args[1].id}, which is not in the loop of node {loop}"
