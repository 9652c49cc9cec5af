"""Lets the functions of einops record themselves when they are given a value of the graph.

einops asks for the shape of its argument at once, which a value does not know yet, so its own way of adding a tensor library
(a backend) comes too late. Its six functions are therefore told to ask first whether they were given a value. It is the code
of the functions that changes, not the names in the package: ``from einops import rearrange`` may have run long before.
On tensors they do what they did.
"""

from __future__ import annotations

import functools
from types import FunctionType
from typing import TYPE_CHECKING, Any

import einops

from nnsight_hpc.tracing.lines import users_line
from nnsight_hpc.tracing.value import Value
from nnsight_hpc.wire.errors import InvalidGraph

if TYPE_CHECKING:
    from collections.abc import Callable

NAMES = ("einsum", "pack", "parse_shape", "rearrange", "reduce", "repeat", "unpack")


def install() -> None:
    """Let einops record values, once."""
    for name in NAMES:
        function = getattr(einops, name)
        if "_to" not in (function.__kwdefaults__ or {}):
            _hand_on(function, name)


def _hand_on(function: FunctionType, name: str) -> None:
    plain = FunctionType(function.__code__, function.__globals__, name, function.__defaults__, function.__closure__)
    plain.__kwdefaults__ = function.__kwdefaults__
    function.__code__ = _calls_to.__code__
    function.__defaults__ = None
    function.__kwdefaults__ = {"_to": functools.partial(_record_or_run, name, plain)}
    function.__wrapped__ = plain  # type: ignore[attr-defined] # its signature, for help and inspect


def _calls_to(*args: Any, _to: Callable[..., Any], **kwargs: Any) -> Any:
    return _to(*args, **kwargs)


def _record_or_run(name: str, plain: FunctionType, /, *args: Any, **kwargs: Any) -> Any:
    value = next((item for item in _given(args, kwargs) if type(item) is Value), None)
    return plain(*args, **kwargs) if value is None else _record(value, name, args, kwargs)


def _given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments, and the entries of lists among them: einops takes lists of tensors."""
    given = [*args, *kwargs.values()]
    return given + [entry for item in given if isinstance(item, list | tuple) for entry in item]


def _record(value: Value, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if any(callable(item) and type(item) is not Value for item in _given(args, kwargs)):
        raise InvalidGraph(
            f"einops.{name} with a Python function cannot be recorded",
            where=str(users_line()),
            next="name the reduction ('mean', 'sum', 'max', …), or apply the function to the value itself",
        )
    result = value.recorder.record(f"einops.{name}", *args, **kwargs)
    return _TAKEN_APART[name](result, *args, **kwargs) if name in _TAKEN_APART else result


def _packed(result: Value, tensors: Any, pattern: str) -> tuple[Value, Any]:  # noqa: ARG001 - the signature of einops
    shapes = result[1]
    return result[0], shapes if type(tensors) is Value else [shapes[index] for index in range(len(tensors))]


def _unpacked(result: Value, tensor: Any, packed_shapes: Any, pattern: str) -> Any:  # noqa: ARG001 - as above
    return result if type(packed_shapes) is Value else [result[index] for index in range(len(packed_shapes))]


def _lengths(result: Value, tensor: Any, pattern: str) -> dict[str, Value]:  # noqa: ARG001 - as above
    return {axis: result[axis] for axis in pattern.split() if axis not in ("_", "...")}


_TAKEN_APART: dict[str, Callable[..., Any]] = {"pack": _packed, "unpack": _unpacked, "parse_shape": _lengths}
"""What einops returns as several things has a known number of them, so that ``a, b = unpack(…)`` works on values, too."""
