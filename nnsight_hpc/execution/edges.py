"""What each node of a graph waits for: the values that it uses, and the order of reads and writes of one memory."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from typing import TYPE_CHECKING

from nnsight_hpc.graph.build import BACKWARD, COLLECT, FINAL, INVOKE, PARAMETER, READ_GRAD, SET_GRAD
from nnsight_hpc.graph.effort import spend
from nnsight_hpc.graph.nodes import refs_in
from nnsight_hpc.graph.operations import IN_PLACE
from nnsight_hpc.graph.points import AT_A_MODULE, SETTERS, Point
from nnsight_hpc.graph.sharing import changes_container
from nnsight_hpc.wire.errors import InvalidGraph

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from nnsight_hpc.execution.loops import Loop
    from nnsight_hpc.execution.scope import Scope
    from nnsight_hpc.graph.nodes import Node


def needs_of(scope: Scope, backwards: Mapping[int, tuple[int, ...]]) -> dict[int, tuple[int, ...]]:
    """For each node the nodes whose values it uses, each once."""
    return {number: tuple(dict.fromkeys(_needed(scope, scope.node(number), backwards))) for number in scope.here}


def _needed(scope: Scope, node: Node, backwards: Mapping[int, tuple[int, ...]]) -> Iterable[int]:
    """The nodes whose values `node` uses; the forward that a point belongs to is none of them."""
    if node.op in (FINAL, COLLECT):
        yield node.args[0].id
    elif node.op in AT_A_MODULE:
        yield from refs_in(node.args[1:])
    elif node.op != INVOKE:
        yield from refs_in((node.args, {key: value for key, value in node.kwargs.items() if key != "backward"}))
    yield from scope.loops[node.id].outside if node.id in scope.loops else ()
    yield from backwards.get(node.id, ())
    if node.block is not None:
        yield node.block


def changed_by(node: Node, loops: Mapping[int, Loop]) -> tuple[int, ...]:
    """The nodes whose values this one changes in place."""
    if node.id in loops:
        return loops[node.id].changed
    return tuple(refs_in(node.args[0]))[:1] if node.op in IN_PLACE and node.args else ()


def written_in(scope: Scope) -> dict[int, frozenset[int]]:
    """The memory that nodes change in place, of those that change any."""
    return {number: blocks for number in scope.here if (blocks := _written_by(scope, scope.node(number)))}


def _written_by(scope: Scope, node: Node) -> frozenset[int]:
    targets = changed_by(node, scope.loops)
    if changes_container(node, scope.graph):
        return frozenset(map(scope.memory, targets))
    return frozenset(block for target in targets for block in scope.memory.with_held(target))


def edges_of(
    scope: Scope,
    needs: Mapping[int, tuple[int, ...]],
    written: Mapping[int, frozenset[int]],
    after: Mapping[int, int],
) -> dict[int, set[int]]:
    """For each node the nodes that must run before it: what it uses, and the order of reads and writes of one memory.

    `after` has, for a change, the last forward that it must not disturb.
    """
    edges: dict[int, set[int]] = {}
    readers: dict[int, list[int]] = defaultdict(list)  # of each memory, since its last write
    writer: dict[int, int] = {}
    shared = {block for blocks in written.values() for block in blocks}
    for number in scope.here:
        spend(20)
        before = set(needs[number])
        for block in _touched(scope, scope.node(number), needs[number]) & shared if shared else ():
            if block in writer:
                before.add(writer[block])
            if block in written.get(number, ()):
                before.update(readers.pop(block, ()))
                writer[block] = number
            else:
                readers[block].append(number)
        before.discard(number)
        if number in after:
            before.add(after[number])
        edges[number] = before
    return edges


def _touched(scope: Scope, node: Node, needs: Iterable[int]) -> set[int]:
    """The memory that a node reads or writes. That of which a gradient is taken is only named, not read."""
    own = {scope.memory(node.id)} if scope.point(node.id) else set()
    if node.op == READ_GRAD:
        return own
    read = refs_in(node.args) if node.op == BACKWARD else refs_in(node.args[1:]) if node.op == SET_GRAD else needs
    return own.union(*(scope.memory.with_held(ref) for ref in read))


def due_of(scope: Scope, written: Mapping[int, frozenset[int]]) -> tuple[dict[Point, tuple[int, ...]], dict[int, int]]:
    """What must have run before the model goes on from each point, and, for changes, the forward that must be over first.

    A change that a later trace makes to a value of an earlier one comes after the earlier forward, as it does in the program.
    """
    points: dict[int, dict[Point, None]] = defaultdict(dict)
    passed: dict[int, int] = {}  # of each memory the last forward that the program is past
    due: dict[Point, list[int]] = defaultdict(list)
    after: dict[int, int] = {}
    over = _over(scope)
    parameters = set(map(scope.memory, scope.having(PARAMETER)))
    for number in scope.here:
        spend(20)
        if point := scope.point(number):
            points[scope.memory(number)][point] = None
            if scope.node(number).op in SETTERS:
                due[point].append(number)
        for block in sorted(written.get(number, ())):
            if block in parameters:
                raise changes_the_model(scope.node(number))
            spend(3 * len(points[block]))
            for point in [p for p in points[block] if over[p.forward] <= number]:
                del points[block][point]
                passed[block] = max(point.forward, passed.get(block, point.forward))
            for point in points[block]:
                due[point].append(number)
            if block in passed:
                after[number] = passed[block]
    return {point: tuple(dict.fromkeys(nodes)) for point, nodes in due.items()}, after


def _over(scope: Scope) -> dict[int, int]:
    """For each pass the node from which on the program is past it: the first forward after all of its points."""
    last = {number: number for number in (*scope.forwards(), *scope.having(BACKWARD))}
    for number in scope.here:
        if point := scope.point(number):
            last[point.forward] = max(number, last[point.forward])
    ends = [*scope.forwards(), len(scope.graph.nodes)]
    return {forward: ends[bisect_right(ends, node, hi=len(ends) - 1)] for forward, node in last.items()}


def changes_the_model(node: Node) -> InvalidGraph:
    """The refusal of a change in place of what all who use the model share."""
    return InvalidGraph(
        f"node {node.id} ({node.op}) would change a parameter of the model",
        where=str(node.source or ""),
        next="clone() the parameter, and change the copy",
    )
