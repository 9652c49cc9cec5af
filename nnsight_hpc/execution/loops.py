"""Loops over values: the body of each becomes a graph of its own, which runs once for each item."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nnsight_hpc.execution.edges import changed_by
from nnsight_hpc.graph.build import CARRIED, COLLECT, FINAL, ITEM, LEAVE, LOOP, NEXT, SAVE
from nnsight_hpc.graph.effort import spend
from nnsight_hpc.graph.nodes import Graph, Node, Ref, map_leaves, refs_in

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nnsight_hpc.execution.schedule import Schedule
    from nnsight_hpc.graph.sharing import Memory

GIVEN = "control.given"
"""In a loop's own graph: a value that comes from outside. No document can hold it."""


@dataclass(frozen=True)
class Loop:
    """A loop, ready to run. Numbers are node ids of the graph that it stands in, or of the body's own graph.

    Attributes
    ----------
    start
        The node whose value is iterated over.
    graph, schedule
        The body.
    outside
        The nodes of outside that the body uses.
    given
        Body's own node to the node outside whose value it stands for.
    items, carried, following
        Body's own nodes: the item of a pass; variables that go from pass to pass, with what they start from; what each is next.
    leaving
        Body's own nodes that tell whether this pass is the last.
    own
        A node of the loop to the body's own.
    collected
        Body's own nodes whose values of all passes are wanted.
    changed
        The nodes of outside whose values the body changes in place.
    saves
        Body's own saves to the node of the loop; in the values of those in `nested` each pass of this loop is a list itself.
    shares
        For a node of the loop, the nodes of outside that its value may share memory with.
    """

    start: int
    graph: Graph
    schedule: Schedule
    outside: tuple[int, ...]
    given: dict[int, int]
    items: tuple[int, ...]
    carried: dict[int, Any]
    following: dict[int, tuple[int, ...]]
    leaving: tuple[int, ...]
    own: dict[int, int]
    collected: tuple[int, ...]
    changed: tuple[int, ...]
    saves: dict[int, int]
    nested: frozenset[int]
    shares: dict[int, tuple[int, ...]]


def bodies(graph: Graph) -> dict[int, tuple[int, ...]]:
    """For each node that is inside of loops, their first nodes from the innermost out."""
    if not any(node.op == LOOP for node in graph.nodes):
        return {}
    inside: dict[int, tuple[int, ...]] = {}
    for node in graph.nodes:
        if node.block is not None:
            around = inside.get(node.block, ())
            inside[node.id] = (node.block, *around) if graph.nodes[node.block].op == LOOP else around
    return {node_id: loops for node_id, loops in inside.items() if loops}


def body_of(  # noqa: PLR0917 - called in one place
    graph: Graph, start: int, body: list[int], handed_out: list[int], collected: list[int], memory: Memory
) -> Loop:
    """The loop that begins with node `start` and has the nodes `body`; `memory` is that of the values outside."""
    from nnsight_hpc.execution.schedule import compile_graph  # noqa: PLC0415 - a loop's body is scheduled like a graph

    nodes = [graph.nodes[node_id] for node_id in body]
    inside = {start, *body}
    outside = tuple(dict.fromkeys(ref for node in nodes for ref in _used(node) if ref not in inside))
    given = dict(enumerate(outside))
    own = {ref: number for number, ref in given.items()} | {node_id: len(given) + n for n, node_id in enumerate(body)}
    graph_of_body = Graph(
        tuple(Node(number, GIVEN) for number in given) + tuple(_moved(node, own, start) for node in nodes),
        model=graph.model,
        kind=graph.kind,
    )
    carried = {own[node.id]: node.args[1] for node in nodes if node.op == CARRIED and node.args[0].id == start}
    items = tuple(own[node.id] for node in nodes if node.op == ITEM and node.args[0].id == start)
    nexts: dict[int, list[int]] = defaultdict(list)
    for node in nodes:
        if node.op == NEXT:
            nexts[own[node.args[0].id]].append(own[node.id])
    following = {variable: tuple(nexts[variable]) for variable in carried}
    around = bodies(graph_of_body)
    leaving = tuple(own[node.id] for node in nodes if node.op == LEAVE and own[node.id] not in around)
    wanted = [own[node_id] for node_id in handed_out] + [node_id for ids in following.values() for node_id in ids]
    sources: dict[int, tuple[int, ...]] = {number: (ref,) for number, ref in given.items()}
    sources |= {node_id: tuple(refs_in(initial)) for node_id, initial in carried.items()}
    sources |= dict.fromkeys(items, tuple(graph.nodes[start].refs()))
    groups: dict[int, list[int]] = defaultdict(list)
    for node_id, refs in sources.items():
        for ref in refs or (start,):
            groups[memory(ref)].append(node_id)
    schedule = compile_graph(graph_of_body, list(groups.values()), [*wanted, *leaving])
    return Loop(
        start=start,
        graph=graph_of_body,
        schedule=schedule,
        outside=tuple(dict.fromkeys([start, *outside])),
        given=given,
        items=items,
        carried=carried,
        following=following,
        leaving=leaving,
        own=own,
        collected=tuple(dict.fromkeys(own[node] for node in collected)),
        changed=_changed_outside(schedule, graph_of_body, sources),
        saves={own[node.id]: node.id for node in nodes if node.op == SAVE},
        nested=frozenset(around),
        shares=_from_outside(schedule, {node: own[node] for node in handed_out}, sources),
    )


def _used(node: Node) -> tuple[int, ...]:
    refs = tuple(node.refs())
    return refs if node.op not in (FINAL, COLLECT) else refs[:1]


def _moved(node: Node, own: Mapping[int, int], start: int) -> Node:
    """A node of the body as it stands in the body's own graph."""
    block = None if node.block in (start, None) else own[node.block]
    if node.op in (ITEM, CARRIED) and node.args[0].id == start:
        return Node(own[node.id], GIVEN, source=node.source, block=block)
    args, kwargs = map_leaves(
        (node.args, dict(node.kwargs)), lambda leaf: Ref(own[leaf.id]) if isinstance(leaf, Ref) else leaf
    )
    return Node(own[node.id], node.op, args, kwargs, node.source, block)


def _changed_outside(schedule: Schedule, graph: Graph, sources: Mapping[int, tuple[int, ...]]) -> tuple[int, ...]:
    blocks = {
        block
        for node in graph.nodes
        for target in changed_by(node, schedule.loops)
        for block in schedule.memory.with_held(target)
    }
    return tuple(
        dict.fromkeys(ref for node_id, refs in sources.items() if schedule.memory(node_id) in blocks for ref in refs)
    )


def _from_outside(
    schedule: Schedule, handed_out: Mapping[int, int], sources: Mapping[int, tuple[int, ...]]
) -> dict[int, tuple[int, ...]]:
    """For what a loop hands out, the nodes of outside that it may share memory with."""
    outside: dict[int, dict[int, None]] = defaultdict(dict)
    for given, refs in sources.items():
        outside[schedule.memory(given)].update(dict.fromkeys(refs))
    shares: dict[int, tuple[int, ...]] = {}
    for node, own in handed_out.items():
        held = schedule.memory.with_held(own)
        shares[node] = tuple(dict.fromkeys(ref for block in held for ref in outside.get(block, ())))
        spend(len(held) + len(shares[node]))
    return shares
