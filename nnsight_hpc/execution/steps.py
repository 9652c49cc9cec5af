"""Nodes made ready to run many times: what carries each out, and who comes after it."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any, NamedTuple

from nnsight_hpc.execution.arguments import arguments_of
from nnsight_hpc.execution.carrying import carrying, saving, special
from nnsight_hpc.execution.interleave import passing
from nnsight_hpc.execution.loops import GIVEN
from nnsight_hpc.execution.special import SPECIAL
from nnsight_hpc.execution.standing import reading, setting
from nnsight_hpc.graph.build import FORWARDS, SAVE
from nnsight_hpc.graph.nodes import Ref
from nnsight_hpc.graph.operations import IN_PLACE, PROTOCOL, VIEWS
from nnsight_hpc.graph.points import SETTERS
from nnsight_hpc.graph.sharing import changes_container

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from nnsight_hpc.execution.arguments import Given
    from nnsight_hpc.execution.run import Run
    from nnsight_hpc.execution.scope import Scope
    from nnsight_hpc.execution.stops import Stops
    from nnsight_hpc.graph.nodes import Node

    Go = Callable[[Run, list[Any]], None]
    """Carries out a node in a run, and puts its value among the others."""


class Step(NamedTuple):
    """A node as it runs.

    Attributes
    ----------
    number, node
        The node.
    go
        Carries it out.
    needs, then
        The nodes whose values it uses, and those that wait for it.
    ends
        The values that nothing uses after it, where that is known beforehand: in what runs straight through.
    """

    number: int
    node: Node
    go: Go
    needs: tuple[int, ...]
    then: tuple[int, ...]
    ends: tuple[int, ...]

    def arguments(self, run: Run) -> Given:
        """Its arguments in a run, for those who have to look at them; to carry it out takes less."""
        return arguments_of(self.node)(run)


def steps_of(
    scope: Scope,
    needs: Mapping[int, tuple[int, ...]],
    edges: Mapping[int, set[int]],
    goes: Mapping[int, Go],
    ends: Mapping[int, Sequence[int]],
) -> tuple[Step | None, ...]:
    """The nodes that run here as they run; None for the others."""
    then: dict[int, list[int]] = defaultdict(list)
    for later in scope.here:
        for earlier in sorted(edges[later]):
            then[earlier].append(later)
    steps: list[Step | None] = [None] * len(scope.graph.nodes)
    for number in scope.here:
        last = tuple(ends.get(number, ()))
        steps[number] = Step(number, scope.node(number), goes[number], needs[number], tuple(then[number]), last)
    return tuple(steps)


def goes_of(
    scope: Scope, stops: Stops, copies: Collection[int], overwritten: Collection[int], uses: Sequence[int]
) -> dict[int, Go]:
    """What carries out each node.

    Parameters
    ----------
    copies
        Saves that copy: of what the model itself holds, where it may write again, and of what the graph changes in place.
    overwritten
        Those of them that copy because the graph changes what they save.
    uses
        For each node, how many nodes use its value.
    """
    goes: dict[int, Go] = {}
    for number in scope.here:
        node, point, part = scope.node(number), scope.point(number), scope.places.rows.get(number)
        if point and node.op in SETTERS:
            goes[number] = setting(node, stops.of[number], point, part, hands_over=not _fresh(node, scope))
        elif point:
            goes[number] = reading(number, stops.of[number], point, part)
        elif node.op == SAVE:
            goes[number] = saving(
                node, copy=number in copies, overwritten=number in overwritten, used=bool(uses[number])
            )
        elif node.op in FORWARDS:
            goes[number] = passing(node)
        elif node.op in SPECIAL:
            goes[number] = special(node)
        else:
            goes[number] = carrying(node, writes=node.op in IN_PLACE and not changes_container(node, scope.graph))
    return goes


def _fresh(setter: Node, scope: Scope) -> bool:
    """Whether what is set is new memory, which nobody else has."""
    given = [scope.node(arg.id).op if isinstance(arg, Ref) else GIVEN for arg in setter.args[2:]]
    return all(op not in PROTOCOL and op not in VIEWS and op not in IN_PLACE and op != GIVEN for op in given)
