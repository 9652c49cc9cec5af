"""The moments at which a forward is looked at: for each touched module and call, before it, instead of it, and after it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from nnsight_hpc.graph.points import Point

_PHASE = {"input": 0, "inputs": 0, "skip": 1, "output": 2, "result": 3}


@dataclass(frozen=True, slots=True)
class Stop:
    """One moment, with all points that are there then.

    Attributes
    ----------
    number
        Its place among all stops of the graph.
    forward
        The forward, or backward, that it belongs to.
    points, nodes
        What stands there, and the nodes that wait for it, in program order.
    must
        The nodes that must have run before the model goes on.
    kinds
        What is read or set there, where gradients begin; empty where none do.
    observed
        Whether something that is seen outside depends on it; without such stops ahead the forward is left.
    """

    number: int
    forward: int
    points: tuple[Point, ...]
    nodes: tuple[int, ...]
    must: tuple[int, ...]
    kinds: tuple[str, ...]
    observed: bool


@dataclass(frozen=True, slots=True)
class Visits:
    """The stops of one module (or operation inside of one) in one forward, by the number of the call."""

    before: dict[int, Stop] = field(default_factory=dict)
    instead: dict[int, Stop] = field(default_factory=dict)
    after: dict[int, Stop] = field(default_factory=dict)
    result: dict[int, Stop] = field(default_factory=dict)

    def phase(self, number: int) -> dict[int, Stop]:
        return (self.before, self.instead, self.after, self.result)[number]

    def all(self) -> tuple[Stop, ...]:
        return (*self.before.values(), *self.instead.values(), *self.after.values(), *self.result.values())


@dataclass(frozen=True, slots=True)
class Passage:
    """What is looked at in one forward.

    Attributes
    ----------
    visits
        The stops of each touched module, or operation inside of one, by its path.
    modules
        The touched modules, each with the operations inside of its forward that are touched.
    stops
        All stops.
    observed
        How many of them something depends on that is seen outside.
    """

    visits: dict[str, Visits]
    modules: dict[str, tuple[str, ...]]
    stops: tuple[Stop, ...]
    observed: int


@dataclass(frozen=True)
class Stops:
    """All stops of a graph.

    Attributes
    ----------
    count
        How many there are.
    forwards
        What is looked at in each forward.
    gradients
        For each backward and node, the moment at which the gradient of the node's value is there.
    of
        For each node that waits for one, its stop.
    """

    count: int
    forwards: dict[int, Passage]
    gradients: dict[tuple[int, int], Stop]
    of: dict[int, Stop]


def stops_of(
    at: Mapping[Point, Collection[int]],
    due: Mapping[Point, Collection[int]],
    roots: Collection[int],
    forwards: Collection[int],
    observed: Collection[int],
) -> Stops:
    """Group the points of a graph by moment; those in `observed` are nodes that something seen outside depends on."""
    moments: dict[tuple[int, str, int, int], list[Point]] = defaultdict(list)
    for point in at:
        moments[point.forward, point.module, _PHASE.get(point.kind, -1), point.call].append(point)
    visits: dict[int, dict[str, Visits]] = {forward: defaultdict(Visits) for forward in forwards}
    gradients: dict[tuple[int, int], Stop] = {}
    of: dict[int, Stop] = {}
    for number, ((forward, module, phase, call), points) in enumerate(moments.items()):
        nodes = tuple(sorted(node for point in points for node in at[point]))
        must = tuple(dict.fromkeys((*nodes, *(node for point in points for node in due.get(point, ())))))
        begins = any(node in roots for node in nodes)
        kinds = tuple(dict.fromkeys(p.kind for p in points if p.kind != "skip")) if begins else ()
        seen = any(node in observed for node in nodes)
        stop = Stop(number, forward, tuple(points), nodes, must, kinds, seen)
        of.update(dict.fromkeys(nodes, stop))
        if phase < 0:
            gradients[forward, int(module)] = stop
        else:
            visits[forward][module].phase(phase)[call] = stop
    return Stops(len(moments), {forward: _passage(dict(paths)) for forward, paths in visits.items()}, gradients, of)


def _passage(visits: dict[str, Visits]) -> Passage:
    modules: dict[str, tuple[str, ...]] = {}
    for path in visits:
        module, _, operation = path.partition(":")
        modules[module] = (*modules.get(module, ()), *([operation] if operation else []))
    stops = tuple(stop for visited in visits.values() for stop in visited.all())
    return Passage(visits, modules, stops, sum(stop.observed for stop in stops))
