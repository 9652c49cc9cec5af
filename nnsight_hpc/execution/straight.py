"""What of a graph runs straight through: all that hangs on one stop of the model and on nothing else.

Nothing outside waits for it and it waits for nothing outside, so its order, that of the program, and the last use of each
value are known beforehand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nnsight_hpc.graph.build import APPEND, CALL, CHECK, DICT, LENGTH, LIST, LOG, READS, RESULT, SAVE, SETS, SKIP
from nnsight_hpc.graph.operations import PROTOCOL

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from nnsight_hpc.execution.scope import Scope
    from nnsight_hpc.execution.stops import Stops

_PLAIN = frozenset({*READS.values(), *SETS.values(), RESULT, SKIP, SAVE, LOG, CHECK, CALL, LIST, DICT, APPEND, LENGTH})
"""Operations of the protocol that neither decide what else runs nor make anything absent."""
_NONE = -1


def straight_runs(scope: Scope, edges: Mapping[int, set[int]], stops: Stops) -> dict[int, list[int]]:
    """For each stop on which such nodes hang, these nodes in program order."""
    owner: dict[int, int] = {}  # of each node the one stop that it hangs on, if it is one
    mixed: set[int] = {_NONE}
    for number in scope.here:
        op, stop = scope.node(number).op, stops.of.get(number)
        on = {owner[earlier] for earlier in edges[number]} | ({stop.number} if stop else set())
        plain = op not in PROTOCOL or op == "attribute" or op in _PLAIN
        if len(on) == 1 and plain and scope.node(number).block is None:
            (owner[number],) = on
        else:
            owner[number] = _NONE
            mixed |= on
    for stop in {stop.number: stop for stop in stops.of.values()}.values():
        if any(owner[number] != stop.number for number in stop.must):
            mixed.add(stop.number)
    runs: dict[int, list[int]] = {}
    for number in scope.here:
        if owner[number] not in mixed:
            runs.setdefault(owner[number], []).append(number)
    return runs


def only_saved(scope: Scope, runs: Mapping[int, Sequence[int]], kept: Collection[int]) -> frozenset[int]:
    """The stops whose values are read to be saved, and nothing else happens to them."""
    reads = frozenset(READS.values())
    return frozenset(
        stop
        for stop, run in runs.items()
        if all(scope.node(number).op in reads or scope.node(number).op == SAVE for number in run)
        and not any(number in kept for number in run)
    )


def ends_of(run: Sequence[int], needs: Mapping[int, tuple[int, ...]], kept: Collection[int]) -> dict[int, list[int]]:
    """For the nodes of a run, in order, which values nothing uses after each; those in `kept` are wanted later."""
    last = {number: number for number in run} | {used: number for number in run for used in needs[number]}
    ends: dict[int, list[int]] = {number: [] for number in run}
    for value, number in last.items():
        if value not in kept:
            ends[number].append(value)
    return ends
