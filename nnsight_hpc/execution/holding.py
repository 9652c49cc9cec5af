"""Who else may hold the memory that the values of a graph lie in, and what must be copied because of that."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from nnsight_hpc.graph.build import CALL, COLLECT, FINAL, PARAMETER, SAVE
from nnsight_hpc.graph.nodes import Ref, TensorRef, leaves
from nnsight_hpc.graph.operations import VIEWS
from nnsight_hpc.graph.points import SETTERS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from nnsight_hpc.execution.scope import Scope
    from nnsight_hpc.graph.nodes import Node

BEGINS = "Tensor.requires_grad_"
"""What makes a value differentiable in place, and changes nothing of it."""


def of_model(scope: Scope, given: Iterable[Iterable[int]]) -> set[int]:
    """The memory that the model, a constant or the outside of a loop may hold, too."""
    found = {scope.memory(number) for group in given for number in group}
    for number in scope.here:
        node = scope.node(number)
        constant = (node.op in VIEWS or node.op in SETTERS) and any(isinstance(a, TensorRef) for a in leaves(node.args))
        if scope.point(number) or node.op in (PARAMETER, CALL, FINAL, COLLECT) or constant:
            found.add(scope.memory(number))
    return found


def copied_saves(scope: Scope, outside: set[int], written: Mapping[int, frozenset[int]]) -> frozenset[int]:
    """The saves of what the model itself holds, where it may write again, and of what the graph changes in place."""
    return _saves_of(scope, outside.union(*written.values()))


def overwritten_saves(scope: Scope, written: Mapping[int, frozenset[int]]) -> frozenset[int]:
    """The saves of what the graph changes in place."""
    changes = (blocks for number, blocks in written.items() if scope.node(number).op != BEGINS)
    return _saves_of(scope, set().union(*changes))


def _saves_of(scope: Scope, shared: set[int]) -> frozenset[int]:
    """The saves of memory that is in `shared`."""
    saves = ((number, scope.node(number).args[0].id) for number in scope.having(SAVE))
    return frozenset(number for number, value in saves if not shared.isdisjoint(scope.memory.with_held(value)))


def exposed(scope: Scope, outside: set[int]) -> frozenset[int]:
    """The forwards that are given memory which somebody else may read: a constant that is used twice, a part of the model."""

    def given(node: Node) -> list[Any]:
        return [*leaves((node.args, dict(node.kwargs)))]

    constants = Counter(leaf.name for node in scope.graph.nodes for leaf in given(node) if isinstance(leaf, TensorRef))
    return frozenset(
        number
        for number in scope.forwards()
        for leaf in given(scope.node(number))
        if (isinstance(leaf, Ref) and not outside.isdisjoint(scope.memory.with_held(leaf.id)))
        or (isinstance(leaf, TensorRef) and constants[leaf.name] > 1)
    )
