"""From the name of an allowed operation to what carries it out. Nothing that is not listed is ever looked up."""

from __future__ import annotations

import functools
import operator
from typing import TYPE_CHECKING, Any

import torch

from nnsight_hpc.graph.nodes import Device, DType
from nnsight_hpc.graph.operations import ALLOWED, ATTRIBUTES, FIELDS, PROTOCOL

if TYPE_CHECKING:
    from collections.abc import Callable

_NAMESPACES: dict[str, Any] = {
    "torch": torch,
    "torch.nn.functional": torch.nn.functional,
    "torch.linalg": torch.linalg,
    "torch.fft": torch.fft,
    "torch.special": torch.special,
    "operator": operator,
}


@functools.cache
def function_of(op: str) -> Callable[..., Any]:
    """What carries out `op`, a name on the list that is not of the protocol itself."""
    if op not in ALLOWED or (op in PROTOCOL and op != "attribute"):
        raise KeyError(op)
    if op == "attribute":
        return attribute
    if op == "operator.setitem":
        return _setitem
    namespace, _, name = op.rpartition(".")
    if namespace == "Tensor":
        return _method(name)
    if namespace == "einops":
        import einops  # noqa: PLC0415 - an optional dependency of torch users

        return getattr(einops, name)  # type: ignore[no-any-return]
    return getattr(_NAMESPACES[namespace], name)  # type: ignore[no-any-return]


def _method(name: str) -> Callable[..., Any]:
    def call(value: Any, /, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name}() is a method of tensors, and the value is of type {type(value).__name__}")
        return getattr(value, name)(*args, **kwargs)

    return call


def _setitem(value: Any, index: Any, new: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"only elements of tensors can be set, and the value is of type {type(value).__name__}")
    value[index] = new
    return value


def attribute(value: Any, name: str) -> Any:
    """A listed attribute of a tensor, a field of a model's output (a mapping) or of a named tuple of torch."""
    if isinstance(value, torch.Tensor):
        known = ATTRIBUTES
    elif type(value).__module__ == "torch.return_types":
        known = frozenset(field for field in FIELDS if hasattr(value, field))
    else:
        known = frozenset(map(str, value)) if isinstance(value, dict) else frozenset()
    if name not in known:
        have = f"; it has {', '.join(sorted(known))}" if known else ""
        raise AttributeError(f"a value of type {type(value).__name__} has no {name!r} here{have}")
    return value[name] if isinstance(value, dict) else getattr(value, name)


def constant(leaf: Any, device: torch.device) -> Any:
    """A constant of a graph as torch wants it. Every device but ``cpu`` means the model's own."""
    if isinstance(leaf, DType):
        return getattr(torch, leaf.name)
    if isinstance(leaf, Device):
        return torch.device("cpu") if leaf.name == "cpu" else device
    return leaf
