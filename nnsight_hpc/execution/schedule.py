"""From a graph to the order in which its nodes may run, before any model is touched.

A node runs as soon as all that it waits for is there: the values that it uses, the point of the model that it reads or sets,
the decision of the block that it stands in, and, for memory that is changed in place, the reads and writes that come before
it in the program. Independent nodes need no order of their own, so an earlier layer may be written after a later one.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakSet

from nnsight_hpc.execution.edges import due_of, edges_of, needs_of, written_in
from nnsight_hpc.execution.forwards import crossings, in_order, observed
from nnsight_hpc.execution.holding import BEGINS, copied_saves, exposed, of_model, overwritten_saves
from nnsight_hpc.execution.loops import Loop, bodies, body_of
from nnsight_hpc.execution.scope import Scope
from nnsight_hpc.execution.steps import Step, goes_of, steps_of
from nnsight_hpc.execution.stops import Stops, stops_of
from nnsight_hpc.execution.straight import ends_of, only_saved, straight_runs
from nnsight_hpc.graph.build import (
    BACKWARD,
    CALL,
    COLLECT,
    ELSE,
    END,
    FINAL,
    FORWARDS,
    IF,
    PARAMETER,
    READ_GRAD,
    READS,
    SET_GRAD,
)
from nnsight_hpc.graph.points import Places, Point, places_of
from nnsight_hpc.graph.sharing import Memory
from nnsight_hpc.wire.errors import InvalidGraph

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch

    from nnsight_hpc.graph.nodes import Graph, Node


@dataclass(frozen=True)
class Schedule:
    """What the interleaver needs to know of a graph. All numbers are node ids.

    Attributes
    ----------
    places
        Where each node stands.
    not_here
        For each node whether it does not run here, as the bodies of loops do not.
    first
        Those that wait for nothing.
    tensors
        The names of the tensor constants.
    parts
        The modules that are named, each with a node that does so.
    waits
        For each node, how many nodes it waits for; its point, if it has one, is one more, and the start of a forward, too.
    steps
        The nodes that run here as they run; None for the others.
    straight
        For each stop what hangs on it alone, in order; nothing where that is not all that does.
    only_saved
        The stops whose values are saved, and nothing else happens to them.
    uses
        For each node, how many nodes use its value: at zero it is dropped.
    forwards
        The forwards in the order in which they run.
    stops
        The moments at which the model is looked at.
    backwards
        For each backward pass the nodes whose gradients are read or set in it.
    gradients
        Whether the graph asks for gradients at all.
    guarded
        For each conditional, the nodes of its block that wait for a point.
    loops
        The loops by their last nodes.
    memory
        Which values may share memory.
    crossings
        What has to happen at one point and needs the value of another of the same forward: node, point, the other point.
    divided
        Forwards of whose batch some nodes see some rows only.
    exposed
        Forwards that are given memory which somebody else may read: a constant that is used twice, a part of the model.
    in_order
        The models whose order of modules is known to suit the crossings.
    """

    places: Places
    not_here: bytes
    first: tuple[int, ...]
    tensors: frozenset[str]
    parts: dict[str, Node]
    waits: tuple[int, ...]
    steps: tuple[Step | None, ...]
    straight: tuple[tuple[Step, ...], ...]
    only_saved: frozenset[int]
    uses: tuple[int, ...]
    forwards: tuple[int, ...]
    stops: Stops
    backwards: dict[int, tuple[int, ...]]
    gradients: bool
    guarded: dict[int, tuple[int, ...]]
    loops: dict[int, Loop]
    memory: Memory
    crossings: tuple[tuple[int, Point, Point], ...]
    divided: frozenset[int]
    exposed: frozenset[int]
    in_order: WeakSet[torch.nn.Module] = field(default_factory=WeakSet)

    def step_of(self, node_id: int) -> Step:
        """The node with that number, which runs here."""
        step = self.steps[node_id]
        assert step is not None, "the bodies of loops have schedules of their own"
        return step


def compile_graph(graph: Graph, given: Iterable[Iterable[int]] = (), kept: Iterable[int] = ()) -> Schedule:
    """The schedule of a validated graph; raises `InvalidGraph` where a parameter of the model would be changed.

    Parameters
    ----------
    given
        For the body of a loop: groups of nodes whose values come from outside and may share memory.
    kept
        Nodes whose values are wanted when all is over.
    """
    scope = _scope_of(graph, given)
    backwards = _backwards(scope)
    needs = needs_of(scope, backwards)
    written = written_in(scope)
    due, after = due_of(scope, written)
    edges = edges_of(scope, needs, written, after)
    at: dict[Point, list[int]] = defaultdict(list)
    for number in scope.here:
        if point := scope.point(number):
            at[point].append(number)
    outside = of_model(scope, given)
    kept = frozenset(kept)
    stops = stops_of(at, due, _roots(scope, backwards, needs), scope.forwards(), observed(scope, due, edges))
    runs = straight_runs(scope, edges, stops)
    ends = {number: ends for run in runs.values() for number, ends in ends_of(run, needs, kept).items()}
    uses = _uses(scope, needs, kept)
    goes = goes_of(scope, stops, copied_saves(scope, outside, written), overwritten_saves(scope, written), uses)
    steps = steps_of(scope, needs, edges, goes, ends)
    return Schedule(
        places=scope.places,
        not_here=bytes(step is None for step in steps),
        first=tuple(n for n in scope.here if not edges[n] and not scope.point(n) and scope.node(n).op not in FORWARDS),
        tensors=frozenset(graph.tensor_names()),
        parts=_parts(scope),
        waits=tuple(
            len(edges.get(node.id, ())) + (node.id in scope.places.points) + (node.op in FORWARDS)
            for node in graph.nodes
        ),
        steps=steps,
        straight=tuple(tuple(filter(None, map(steps.__getitem__, runs.get(n, ())))) for n in range(stops.count)),
        only_saved=only_saved(scope, runs, kept),
        uses=uses,
        forwards=in_order(scope, at, due, edges),
        stops=stops,
        backwards=backwards,
        gradients=bool(backwards or scope.having(BEGINS)),
        guarded=_guarded(scope),
        loops=scope.loops,
        memory=scope.memory,
        crossings=tuple(crossings(scope, due, edges)),
        divided=frozenset(scope.places.points[number].forward for number in scope.places.rows),
        exposed=exposed(scope, outside),
    )


def _scope_of(graph: Graph, given: Iterable[Iterable[int]]) -> Scope:
    inside = bodies(graph)
    here = tuple(node.id for node in graph.nodes if node.id not in inside)
    places = places_of(graph, here)
    memory = Memory(graph, places, groups := _groups(given))
    loops = {end: body_of(graph, *loop, memory) for end, loop in _loops(graph, inside).items()}
    if loops:
        memory = Memory(graph, places, {**_shared_by_loops(graph, loops), **groups})
    return Scope(graph, here, places, memory, loops)


def _uses(scope: Scope, needs: Mapping[int, tuple[int, ...]], kept: Iterable[int]) -> tuple[int, ...]:
    uses = [0] * len(scope.graph.nodes)
    for number in (*(ref for refs in needs.values() for ref in refs), *kept):
        uses[number] += 1
    return tuple(uses)


def _parts(scope: Scope) -> dict[str, Node]:
    named: dict[str, Node] = {}
    for number in scope.here:
        node, point = scope.node(number), scope.point(number)
        if point and point.kind != "grad":
            named.setdefault(point.module.partition(":")[0], node)
        elif node.op == CALL:
            named.setdefault(node.args[0], node)
    return named


def _loops(
    graph: Graph, inside: Mapping[int, tuple[int, ...]]
) -> dict[int, tuple[int, list[int], list[int], list[int]]]:
    """For the last node of each loop that is not inside another: its first, its body, what is handed out, and collected."""
    body: dict[int, list[int]] = defaultdict(list)
    for node_id, loops in inside.items():
        body[loops[-1]].append(node_id)
    handed_out: dict[int, list[int]] = defaultdict(list)
    collected: dict[int, list[int]] = defaultdict(list)
    for node in graph.nodes:
        if node.op in (FINAL, COLLECT):
            handed_out[node.args[0].id].append(node.args[1].id)
        if node.op == COLLECT:
            collected[node.args[0].id].append(node.args[1].id)
    ends = (node for node in graph.nodes if node.op == END and node.id not in inside)
    return {end.id: (end.args[0].id, body[end.args[0].id], handed_out[end.id], collected[end.id]) for end in ends}


def _shared_by_loops(graph: Graph, loops: Mapping[int, Loop]) -> dict[int, Iterable[int]]:
    """For the values that a loop hands out, what of the outside they may share memory with."""
    results = (node for node in graph.nodes if node.op in (FINAL, COLLECT) and node.args[0].id in loops)
    return {node.id: loops[node.args[0].id].shares.get(node.args[1].id, ()) for node in results}


def _groups(given: Iterable[Iterable[int]]) -> dict[int, Iterable[int]]:
    """For each value from outside those that it may share memory with."""
    shared: dict[int, list[int]] = defaultdict(list)
    for first, *others in given:
        for node_id in (first, *others):
            shared[node_id].append(first)
    return dict(shared)


def _backwards(scope: Scope) -> dict[int, tuple[int, ...]]:
    found: dict[int, dict[int, None]] = {number: {} for number in scope.having(BACKWARD)}
    for number in scope.having(READ_GRAD, SET_GRAD):
        point = scope.places.points[number]
        source = scope.node(int(point.module))
        if source.op == PARAMETER:
            raise InvalidGraph(
                "gradients of the model's parameters are not computed",
                where=str(scope.node(number).source or f"node {number}"),
                why="the weights are shared by all who use the model",
                next="take the gradient of an activation, or of a tensor of your own",
            )
        found[point.forward][source.id] = None
    return {backward: tuple(values) for backward, values in found.items()}


def _roots(
    scope: Scope, backwards: Mapping[int, tuple[int, ...]], needs: Mapping[int, tuple[int, ...]]
) -> frozenset[int]:
    """The reads of the model that the values with a gradient come from."""
    waiting = [value for values in backwards.values() for value in values]
    seen = set(waiting)
    while waiting:
        new = set(needs[waiting.pop()]) - seen
        seen |= new
        waiting += new
    return frozenset(number for number in seen if (point := scope.point(number)) and point.kind in READS)


def _guarded(scope: Scope) -> dict[int, tuple[int, ...]]:
    """For each conditional, the nodes of its own block that stand at a point."""
    found: dict[int, list[int]] = {number: [] for number in scope.having(IF, ELSE)}
    for number in scope.here:
        block = scope.node(number).block
        if block is not None and scope.point(number):
            found[block].append(number)
    return {block: tuple(nodes) for block, nodes in found.items()}
