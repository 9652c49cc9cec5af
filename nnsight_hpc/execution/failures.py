"""Errors of a run, said at the user's line: first the line, then the operation, the shapes of its arguments, the module."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from nnsight_hpc.execution.schedule import point_of
from nnsight_hpc.graph.build import CALL, FORWARD
from nnsight_hpc.wire.errors import ExecutionFailed, HpcError, InvalidGraph, execution_error

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from nnsight_hpc.execution.schedule import Point, Schedule
    from nnsight_hpc.graph.nodes import Node


@contextmanager
def explained(node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Turn what an operation raises into an `ExecutionFailed` of the same type that shows the user's line."""
    try:
        yield
    except HpcError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a user's operation raises is theirs to see
        name = type(error).__name__
        bases = [base.__name__ for base in type(error).__mro__]
        known = next((base for base in bases if execution_error(base) is not ExecutionFailed), name)
        module = f" on module {node.args[0]}" if node.op == CALL else ""
        raise execution_error(known)(
            f"{name}: {error}",
            where=str(node.source or f"node {node.id}"),
            why=f"in {node.op}({_described(args, kwargs)}){module}",
            exception=known,
        ) from None


def too_late(node: Node, point: Point, schedule: Schedule, done: set[int]) -> InvalidGraph:
    """What must happen at `point` still waits for a point that the model reaches later."""
    later = ", ".join(_name(p) for p in _awaited(node, schedule, done)) or "what comes later"
    return InvalidGraph(
        f"what happens at {_name(point)} needs a value that is not there yet: {later}",
        where=str(node.source or f"node {node.id}"),
        why="the model passes each point once, in its own order; reads and changes of one value happen in program order",
        next="use a value of an earlier layer, or run two traces and hand the value from the first to the second",
    )


def never_reached(node: Node, schedule: Schedule, done: set[int]) -> InvalidGraph:
    """The forwards are over and `node` never ran: some point that it needs did not come."""
    awaited = [] if node.op == FORWARD else _awaited(node, schedule, done)
    what = (
        f"the model did not reach {_name(awaited[0])}"
        if awaited
        else "a trace uses a value of a trace that comes after it"
    )
    return InvalidGraph(
        what,
        where=str(node.source or f"node {node.id}"),
        why="the module was not called in this forward, or not that often" if awaited else "",
    )


def _awaited(node: Node, schedule: Schedule, done: set[int]) -> list[Point]:
    """The points, not reached yet, that `node` waits for, directly or through others."""
    waiting, seen, found = [node.id], {node.id}, []
    before: dict[int, list[int]] = {}
    for earlier, later in enumerate(schedule.then):
        for one in later:
            before.setdefault(one, []).append(earlier)
    while waiting:
        current = waiting.pop()
        point = point_of(schedule.graph.nodes[current])
        inputs = [n for n in before.get(current, ()) if n not in done]
        if point and not inputs and current not in done:
            found.append(point)
        waiting += [n for n in inputs if n not in seen]
        seen.update(inputs)
    return list(dict.fromkeys(found))


def _name(point: Point) -> str:
    name = f"{point.module}.{point.kind}" if point.module else point.kind
    return f"{name} (call {point.call})" if point.call else name


def _described(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    return ", ".join([*map(_shape, args), *(f"{key}={_shape(value)}" for key, value in kwargs.items())])


def _shape(value: Any) -> str:
    """A value in few characters: of a tensor its dtype and shape, never its content."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, list | tuple) and any(isinstance(item, torch.Tensor) for item in value):
        return f"[{', '.join(map(_shape, value))}]"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
