"""Arguments of a node as functions of a run, made once when the graph is compiled, so that no run looks through them again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nnsight_hpc.execution.resolve import constant
from nnsight_hpc.graph.build import COLLECT, FINAL, FORWARDS, INVOKE, PARAMETER, READ_GRAD, SET_GRAD
from nnsight_hpc.graph.nodes import Device, DType, Held, Ref, Seed, TensorRef
from nnsight_hpc.graph.points import AT_A_MODULE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from nnsight_hpc.execution.run import Run
    from nnsight_hpc.graph.nodes import Node

    Make = Callable[[Run], Any]
    Given = tuple[tuple[Any, ...], dict[str, Any]]

_BY_NAME = frozenset({FINAL, COLLECT, INVOKE, PARAMETER})
"""Operations whose arguments are numbers of nodes or names, not values."""


def maker(argument: Any, *, own: bool = False) -> Make:
    """What gives a nested argument in a run, with values in place of references, and lists and dicts of its own.

    Parameters
    ----------
    own
        Whether who gets it may write into it: then the graph's tensor constants are copied, but for those that gradients are
        taken of.
    """
    if isinstance(argument, Ref):
        number = argument.id
        return lambda run: run.values[number]
    if isinstance(argument, TensorRef):
        name = argument.name
        return (lambda run: _copied(run.shared.tensors[name])) if own else lambda run: run.shared.tensors[name]
    if isinstance(argument, Held):
        place = argument.number
        return lambda run: run.shared.objects[place]
    if is_plain(argument):
        return lambda _run: argument
    if isinstance(argument, dict):
        entries = {key: maker(item, own=own) for key, item in argument.items()}
        return lambda run: {key: make(run) for key, make in entries.items()}
    if isinstance(argument, slice):
        ends = [maker(end, own=own) for end in (argument.start, argument.stop, argument.step)]
        return lambda run: slice(*[make(run) for make in ends])
    if isinstance(argument, list | tuple):
        kind, parts = (list if isinstance(argument, list) else tuple), [maker(part, own=own) for part in argument]
        return lambda run: kind([make(run) for make in parts])
    return lambda run: constant(argument, run.shared.device)


def arguments(args: Sequence[Any], kwargs: Mapping[str, Any], *, own: bool = False) -> Callable[[Run], Given]:
    """What gives all arguments of a node in a run."""
    positional, named = (
        [maker(arg, own=own) for arg in args],
        [(key, maker(arg, own=own)) for key, arg in kwargs.items()],
    )
    return lambda run: (tuple([make(run) for make in positional]), {key: make(run) for key, make in named})


def arguments_of(node: Node) -> Callable[[Run], Given]:
    """What gives the arguments of a node that are values: not the forward that its point belongs to.

    A forward gets copies of the graph's constants, since a model may write into its inputs.
    """
    if node.op in _BY_NAME:
        return arguments((), {})
    if node.op in (READ_GRAD, SET_GRAD):
        return arguments(node.args, {})
    return arguments(node.args[1:] if node.op in AT_A_MODULE else node.args, node.kwargs, own=node.op in FORWARDS)


def is_plain(value: Any) -> bool:
    """Whether a constant is the same in every run, and cannot be changed by who gets it."""
    if type(value) is slice:
        return is_plain(value.start) and is_plain(value.stop) and is_plain(value.step)
    if type(value) is tuple:
        return all(map(is_plain, value))
    return not isinstance(value, Ref | TensorRef | Held | DType | Device | Seed | list | dict)


def _copied(constant: Any) -> Any:
    return constant if constant.requires_grad else constant.clone()
