"""Errors of a run, said at the user's line: first the line, then the operation, the shapes of its arguments, the module."""

from __future__ import annotations

import reprlib
from traceback import walk_tb
from typing import TYPE_CHECKING, Any

import torch

from nnsight_hpc.graph.build import CALL, FORWARDS, GENERATE
from nnsight_hpc.wire.errors import ExecutionFailed, HpcError, InvalidGraph, execution_error

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from nnsight_hpc.execution.schedule import Schedule
    from nnsight_hpc.graph.nodes import Node
    from nnsight_hpc.graph.points import Point


class OutOfMemoryError(execution_error("MemoryError"), torch.OutOfMemoryError):  # type: ignore[misc] # made by a function
    """A GPU has no memory left: torch's own type here, and a `MemoryError` where torch is not."""


def explained(node: Node, args: Sequence[Any], kwargs: Mapping[str, Any], error: Exception) -> HpcError:
    """What an operation raised, as an `ExecutionFailed` of the same type that shows the user's line."""
    if isinstance(error, HpcError):
        return error
    name = type(error).__name__
    bases = [base.__name__ for base in type(error).__mro__]
    known = next((base for base in bases if execution_error(base) is not ExecutionFailed), name)
    kind = execution_error(known)
    if isinstance(error, torch.OutOfMemoryError):
        known, kind = "MemoryError", OutOfMemoryError
    module = f" on module {node.args[0]}" if node.op == CALL else ""
    return kind(
        f"{name}: {error}",
        where=str(node.source or f"node {node.id}"),
        why=f"in {node.op}({_described(args, kwargs)}){module}",
        exception=known,
    )


def in_the_model(  # noqa: PLR0917 - called in one place
    forward: Node,
    last_set: Node | None,
    model: torch.nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    error: Exception,
) -> HpcError:
    """What the model itself raised, with the module that did; shown at the last change before it, which may be the cause."""
    explanation = explained(forward, args, kwargs, error)
    if explanation is error:
        return explanation
    path = _raised_in(model, error)
    explanation.why = f"in the model's own {f'module {path}' if path else 'forward'}; {explanation.why}"
    if last_set is not None and last_set.source is not None:
        explanation.why += f"\nthe forward: {explanation.where}"
        explanation.where = str(last_set.source)
        explanation.next = "the last change before the error is shown; validate=True checks the shapes of all changes"
    return explanation


def _raised_in(model: torch.nn.Module, error: Exception) -> str:
    """The path of the innermost module of the model whose forward an error came through."""
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    owners = [frame.f_locals.get("self") for frame in frames if frame.f_code.co_name == "forward"]
    names = {id(module): name for name, module in model.named_modules()}
    return next((names[id(owner)] for owner in reversed(owners) if id(owner) in names), "")


def too_late(node: Node, point: Point, schedule: Schedule, done: Sequence[int]) -> InvalidGraph:
    """What must happen at `point` still waits for a point that the model reaches later."""
    return out_of_order(node, point, *_awaited(node, schedule, done))


def out_of_order(node: Node, point: Point, *needed: Point) -> InvalidGraph:
    """What `node` does at `point` needs values of points that the model reaches later."""
    return InvalidGraph(
        f"what happens at {point} needs a value that is not there yet: {', '.join(map(str, needed)) or 'what comes later'}",
        where=str(node.source or f"node {node.id}"),
        why="the model passes each point once, in its own order; reads and changes of one value happen in program order",
        next="use a value of an earlier layer, or run two traces and hand the value from the first to the second",
    )


def never_reached(node: Node, schedule: Schedule, done: Sequence[int]) -> InvalidGraph:
    """The forwards are over and `node` never ran: some point that it needs did not come."""
    awaited = [] if node.op in FORWARDS else _awaited(node, schedule, done)
    source = str(node.source or f"node {node.id}")
    if not awaited:
        return InvalidGraph("a trace uses a value of a trace that comes after it", where=source)
    what, [point, *_] = f"the model did not reach {awaited[0]}", awaited
    if point.call and schedule.step_of(point.forward).node.op == GENERATE:
        why = "the generation ended before that step, or the module was not called in each"
        instead = "loop over tracer.iter[:]: after it a name is what the last step that came has left"
        return InvalidGraph(what, where=source, why=why, next=instead)
    return InvalidGraph(what, where=source, why="the module was not called in this forward, or not that often")


def _awaited(node: Node, schedule: Schedule, done: Sequence[int]) -> list[Point]:
    """The points, not reached yet, that `node` waits for, directly or through others."""
    waiting, seen, found = [node.id], {node.id}, []
    before: dict[int, list[int]] = {}
    for step in filter(None, schedule.steps):
        for later in step.then:
            before.setdefault(later, []).append(step.node.id)
    while waiting:
        current = waiting.pop()
        point = schedule.places.points.get(current)
        inputs = [n for n in before.get(current, ()) if not done[n]]
        if point and not inputs and not done[current]:
            found.append(point)
        waiting += [n for n in inputs if n not in seen]
        seen.update(inputs)
    return list(dict.fromkeys(found))


def _described(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    return ", ".join([*map(_shape, args), *(f"{key}={_shape(value)}" for key, value in kwargs.items())])


class _Shapes(reprlib.Repr):
    """Values in few characters: of a tensor its dtype and shape, never its content; of what is nested, the beginning."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 60, 60

    def repr_Tensor(self, tensor: torch.Tensor, _level: int) -> str:  # noqa: N802 - reprlib finds it by this name
        return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"

    repr_Parameter = repr_FakeTensor = repr_Tensor  # noqa: N815


_shape = _Shapes().repr
