"""Nodes made ready to run many times: their arguments as templates, what carries each out, who comes after it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nnsight_hpc.execution.loops import GIVEN
from nnsight_hpc.execution.points import SETTERS
from nnsight_hpc.execution.resolve import function_of, names_a_device
from nnsight_hpc.graph.build import COLLECT, FINAL, INVOKE, KIND_OF, PARAMETER, READ_GRAD, SET_GRAD
from nnsight_hpc.graph.nodes import Device, DType, Ref, Seed, TensorRef
from nnsight_hpc.graph.operations import IN_PLACE, PROTOCOL, VIEWS

if TYPE_CHECKING:
    from collections.abc import Callable

    from nnsight_hpc.execution.stops import Stop
    from nnsight_hpc.graph.nodes import Node

_BY_NAME = frozenset({FINAL, COLLECT, INVOKE, PARAMETER})
"""Operations whose arguments are numbers of nodes or names, not values."""


class Step:
    """A node as it runs.

    Attributes
    ----------
    node
        The node itself.
    function
        The plain function that carries it out; None where the run itself does.
    flat
        Its positional arguments, each as (is a node's value, its number or the constant); None where they have to be
        looked through.
    args, kwargs
        The arguments as the graph has them, without the forward that a point belongs to.
    constant
        Whether the keywords are constants only, and so are handed on as they are.
    needs, then
        The nodes whose values it uses, and those that wait for it.
    writes
        Whether it changes its first argument in place. Whether that is the model's own memory is asked each time: what the
        graph tells of memory is an order, not a protection.
    hands_over
        Whether it gives the model something that may be somebody else's memory.
    stop
        The moment that it waits for, if it does.
    reads
        What it reads there whole, ``input``, ``inputs`` or ``output``; empty for everything else.
    """

    __slots__ = (
        "args",
        "constant",
        "flat",
        "function",
        "hands_over",
        "kwargs",
        "needs",
        "node",
        "reads",
        "stop",
        "then",
        "writes",
    )

    def __init__(
        self,
        node: Node,
        needs: tuple[int, ...],
        then: tuple[int, ...],
        stop: Stop | None,
        *,
        whole: bool,
        changes_container: bool,
        fresh: bool,
    ) -> None:
        self.node, self.needs, self.then, self.stop = node, needs, then, stop
        self.reads = KIND_OF.get(node.op, "") if whole and node.op not in SETTERS else ""
        gradient = node.op in (READ_GRAD, SET_GRAD)
        self.args = () if node.op in _BY_NAME else node.args[1:] if stop and not gradient else node.args
        self.kwargs = {} if node.op in _BY_NAME or gradient else dict(node.kwargs)
        self.constant = all(_plain(value) for value in self.kwargs.values())
        flat = all(type(value) is Ref or _plain(value) for value in self.args)
        self.flat = tuple((True, a.id) if type(a) is Ref else (False, a) for a in self.args) if flat else None
        plain = node.op == "attribute" or (node.op not in PROTOCOL and node.op != GIVEN)
        direct = plain and not names_a_device(node.op, self.kwargs)
        self.function: Callable[..., Any] | None = function_of(node.op) if direct else None
        self.writes = node.op in IN_PLACE and not changes_container
        self.hands_over = not fresh


def is_fresh(node: Node) -> bool:
    """Whether the value of `node` is new memory, which nobody else has."""
    return node.op not in PROTOCOL and node.op not in VIEWS and node.op not in IN_PLACE and node.op != GIVEN


def _plain(value: Any) -> bool:
    """Whether a constant is the same in every run, and cannot be changed by who gets it."""
    if type(value) is slice:
        return _plain(value.start) and _plain(value.stop) and _plain(value.step)
    if type(value) is tuple:
        return all(map(_plain, value))
    return not isinstance(value, Ref | TensorRef | DType | Device | Seed | list | dict)
