"""What carries out the operations of the protocol that stand at no point of the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from nnsight_hpc.execution.arguments import maker
from nnsight_hpc.execution.control import as_items, range_of, text_of
from nnsight_hpc.execution.locate import find_parameter
from nnsight_hpc.execution.loops import GIVEN
from nnsight_hpc.execution.memory import apart, memory_of
from nnsight_hpc.execution.plain import MAX_ENTRIES
from nnsight_hpc.execution.values import Absent
from nnsight_hpc.graph.build import (
    APPEND,
    APPLY,
    BACKWARD,
    CALL,
    CHECK,
    COLLECT,
    DICT,
    ELSE,
    END,
    FINAL,
    IF,
    INVOKE,
    LEAVE,
    LENGTH,
    LIST,
    LOG,
    LOOP,
    MERGE,
    NEXT,
    PARAMETER,
    RANGE,
    REACHED,
)
from nnsight_hpc.graph.nodes import leaves, map_leaves

if TYPE_CHECKING:
    from collections.abc import Callable

    from nnsight_hpc.execution.run import Run
    from nnsight_hpc.graph.nodes import Node

Arguments = tuple[Any, ...]
Keywords = dict[str, Any]
Passes = tuple[dict[int, Any], dict[int, list[Any]]]
"""The values of the last pass (without one, what the variables start from), and those of all passes that are collected."""


def _call(run: Run, node: Node, args: Arguments, kwargs: Keywords) -> Any:
    """Call a module of the model on a value; hooks of the running forward do not see this call.

    The result shares no memory with what went in, so that what is known of memory from the graph holds.
    """
    shared, path, view = run.shared, node.args[0], run.shared.view
    args, kwargs = shared.weights.apart((args[1:], dict(kwargs)))
    if _works_in_place(shared.parts[path]):  # what it is given may be the model's
        args, kwargs = map_leaves((args, kwargs), _copied)
    if view is not None and view.sharded(path, "input"):
        args, kwargs = view.own(path, "input", (args, kwargs))
    shared.in_call = True
    try:
        result = shared.parts[path](*args, **kwargs)
        if view is not None and view.sharded(path, "output"):
            result = view.whole(path, "output", result)
        return apart(shared.weights.apart(result), memory_of((args, kwargs)))
    finally:
        shared.in_call = False


def _works_in_place(module: torch.nn.Module) -> bool:
    return any(getattr(part, "inplace", False) for part in module.modules())


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf


def _merge(_run: Run, _node: Node, args: Arguments, _kwargs: Keywords) -> Any:
    taken = args[0]
    chosen = taken if isinstance(taken, Absent) else args[1] if taken else args[2]
    return next((leaf for leaf in leaves(chosen) if isinstance(leaf, Absent)), chosen)


def _append(_run: Run, _node: Node, args: Arguments, _kwargs: Keywords) -> Any:
    items, new = args
    if not isinstance(items, list):
        raise TypeError(f"only a list can be appended to, and the value is of type {type(items).__name__}")
    if len(items) >= MAX_ENTRIES:
        raise ValueError(f"a list of more than {MAX_ENTRIES} entries")
    if not isinstance(new, Absent):
        items.append(new)
    return items


def _log(run: Run, node: Node, args: Arguments, _kwargs: Keywords) -> None:
    run.shared.log(" ".join(map(text_of, args)), str(node.source or ""))


def _parameter(run: Run, node: Node, _args: Arguments, _kwargs: Keywords) -> torch.Tensor:
    found, view = find_parameter(run.shared.module, node), run.shared.view
    return found if view is None else view.parameter(found)


def _check(run: Run, _node: Node, args: Arguments, _kwargs: Keywords) -> None:
    if not run.shared.decide(args[0]):
        raise AssertionError(" ".join(map(text_of, args[1:])))


def _end(run: Run, node: Node, _args: Arguments, _kwargs: Keywords) -> Passes | Absent:
    """Run the body of a loop once for each item."""
    loop = run.schedule.loops[node.id]
    for save in loop.saves.values():
        run.saved.setdefault(save, [])
    if isinstance(through := run.values[loop.start], Absent):
        return through
    initial = {variable: maker(start)(run) for variable, start in loop.carried.items()}
    outside = {own: run.values[given] for own, given in loop.given.items()}
    carried, last = dict(initial), None
    collected: dict[int, list[Any]] = {own: [] for own in loop.collected}
    for item in as_items(through):
        body = run.run_body(loop, {**outside, **carried, **dict.fromkeys(loop.items, item)})
        for save, value in body.saved.items():
            if not isinstance(value, Absent):
                run.saved[loop.saves[save]] += value if save in loop.nested else [value]
        for variable, following in loop.following.items():
            made = [body.values[number] for number in following if not isinstance(body.values[number], Absent)]
            carried[variable] = made[-1] if made else carried[variable]
        last = {**dict(enumerate(body.values)), **carried}
        for own, values in collected.items():
            if not isinstance(last[own], Absent):
                values.append(last[own])
        if any(body.values[number] is True for number in loop.leaving):
            break
    return initial if last is None else last, collected


def _final(run: Run, node: Node, _args: Arguments, _kwargs: Keywords) -> Any:
    ended: Passes | Absent = run.values[node.args[0].id]
    if isinstance(ended, Absent):
        return ended
    return ended[0].get(_own(run, node), Absent("its loop made no pass"))


def _collect(run: Run, node: Node, _args: Arguments, _kwargs: Keywords) -> Any:
    own, ended = _own(run, node), run.values[node.args[0].id]
    if isinstance(ended, Absent):
        return ended
    return list(ended[1][own])


def _own(run: Run, node: Node) -> int:
    """The number that the node which is handed out has in the body's own graph."""
    return run.schedule.loops[node.args[0].id].own[node.args[1].id]


SPECIAL: dict[str, Callable[[Run, Node, Arguments, Keywords], Any]] = {
    PARAMETER: _parameter,
    CALL: _call,
    INVOKE: lambda _run, _node, _args, _kwargs: None,
    BACKWARD: lambda run, node, args, kwargs: run.differentiate(node, args, kwargs),
    IF: lambda run, _node, args, _kwargs: run.shared.decide(args[0]),
    ELSE: lambda run, _node, args, _kwargs: not run.shared.decide(args[0]),
    MERGE: _merge,
    LOOP: lambda _run, _node, args, _kwargs: args[0],
    GIVEN: lambda run, node, _args, _kwargs: run.given[node.id],
    NEXT: lambda _run, _node, args, _kwargs: args[1],
    END: _end,
    FINAL: _final,
    COLLECT: _collect,
    LEAVE: lambda run, _node, args, _kwargs: run.shared.decide(args[0]),
    CHECK: _check,
    REACHED: lambda _run, _node, args, _kwargs: not isinstance(args[0], Absent),
    LENGTH: lambda _run, _node, args, _kwargs: len(args[0]),
    RANGE: lambda _run, _node, args, _kwargs: range_of(*args),
    LIST: lambda _run, _node, args, _kwargs: list(args),
    DICT: lambda _run, _node, _args, kwargs: dict(kwargs),
    APPEND: _append,
    LOG: _log,
    APPLY: lambda _run, _node, args, kwargs: args[0](*args[1:], **kwargs),
}
