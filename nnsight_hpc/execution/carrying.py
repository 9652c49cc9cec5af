"""What carries out the operations of a graph that stand at no point: a function for each node, made when it is compiled.

The arguments of nearly all operations are one or two values, or a value and a constant; those are handed on at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from nnsight_hpc.execution.arguments import arguments, arguments_of, is_plain, maker
from nnsight_hpc.execution.plain import within
from nnsight_hpc.execution.resolve import carry_out, function_of, names_a_device
from nnsight_hpc.execution.special import SPECIAL
from nnsight_hpc.execution.values import kept
from nnsight_hpc.graph.build import APPLY, CALL, LOG, MERGE
from nnsight_hpc.graph.nodes import Ref

if TYPE_CHECKING:
    from collections.abc import Callable

    from nnsight_hpc.execution.run import Run
    from nnsight_hpc.execution.steps import Go
    from nnsight_hpc.graph.nodes import Node

_WALK = frozenset({MERGE, LOG, CALL, APPLY})
"""What walks through nested lists, which may be endless although they are small."""


def carrying(node: Node, *, writes: bool) -> Go:
    """Carries out an operation that is none of the protocol, or asks for an attribute.

    With `writes` it changes its first argument in place. Whether that is the model's own memory is asked each time: what the
    graph tells of memory is an order, not a protection.
    """
    go = _on_device(node) if names_a_device(node.op, node.kwargs) else _direct(node)
    if not writes:
        return go
    changed = maker(node.args[0])

    def change(run: Run, values: list[Any]) -> None:
        run.shared.refuse_change(node, changed(run))
        go(run, values)

    return change


def _on_device(node: Node) -> Go:
    number, op, given = node.id, node.op, arguments(node.args, node.kwargs)

    def go(run: Run, values: list[Any]) -> None:
        args, kwargs = given(run)
        values[number] = carry_out(op, args, kwargs, run.shared.device)

    return go


def _direct(node: Node) -> Go:
    number, function, args, kwargs = node.id, function_of(node.op), node.args, dict(node.kwargs)
    is_value = [type(arg) is Ref for arg in args]
    if not all(value or is_plain(arg) for value, arg in zip(is_value, args, strict=True)) or not is_plain(
        (*kwargs.values(),)
    ):
        return _nested(node, function)
    if is_value == [True] and not kwargs:
        return _of_one(number, function, args[0].id)
    if is_value == [True, True] and not kwargs:
        return _of_two(number, function, args[0].id, args[1].id)
    if is_value == [True, False] and not kwargs:
        return _with_constant(number, function, args[0].id, args[1])
    places = tuple((value, arg.id if value else arg) for value, arg in zip(is_value, args, strict=True))

    def flat(_run: Run, values: list[Any]) -> None:
        values[number] = function(*[values[arg] if value else arg for value, arg in places], **kwargs)

    return flat


def _nested(node: Node, function: Callable[..., Any]) -> Go:
    number, given = node.id, arguments(node.args, node.kwargs)

    def nested(run: Run, values: list[Any]) -> None:
        args, kwargs = given(run)
        values[number] = function(*args, **kwargs)

    return nested


def _of_one(number: int, function: Callable[[Any], Any], value: int) -> Go:
    def one(_run: Run, values: list[Any]) -> None:
        values[number] = function(values[value])

    return one


def _of_two(number: int, function: Callable[[Any, Any], Any], value: int, other: int) -> Go:
    def two(_run: Run, values: list[Any]) -> None:
        values[number] = function(values[value], values[other])

    return two


def _with_constant(number: int, function: Callable[[Any, Any], Any], value: int, constant: Any) -> Go:
    def both(_run: Run, values: list[Any]) -> None:
        values[number] = function(values[value], constant)

    return both


def special(node: Node) -> Go:
    """Carries out an operation of the protocol that stands at no point of the model."""
    function, given, number, walks = SPECIAL[node.op], arguments_of(node), node.id, node.op in _WALK

    def go(run: Run, values: list[Any]) -> None:
        args, kwargs = given(run)
        if walks and (len(args) != 1 or not isinstance(args[0], torch.Tensor)):
            within((args, kwargs))
        values[number] = function(run, node, args, kwargs)

    return go


def saving(node: Node, *, copy: bool, overwritten: bool, used: bool) -> Go:
    """Keeps a value for the user.

    Parameters
    ----------
    copy
        Whether somebody may write into the value's memory later: the model, or the graph.
    overwritten
        Whether the graph does. Otherwise a value with a history is kept itself, so that it can be differentiated by.
    used
        Whether the graph goes on with the saved value; otherwise nothing is copied where it is not kept.
    """
    number, saved = node.id, node.args[0].id

    def save(run: Run, values: list[Any]) -> None:
        value, gradients = values[saved], run.shared.gradients
        if not used and not run.shared.keeps(number):
            run.saved[number] = None
            return
        if not isinstance(value, torch.Tensor):
            within(value)
            differentiable = False
        else:
            differentiable = gradients and value.requires_grad
        value = kept(value, copy=overwritten if differentiable else copy, detach=not gradients)
        run.saved[number] = values[number] = value

    return save
