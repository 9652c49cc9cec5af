"""From whatever can be called to the Python function that it runs, and from an operation to what it calls.

A decorated function is what its decorators call in the end. A decorator that does not call what it decorates, but looks
something else up (transformers' experts), stands for itself: the lookup is then an operation, and what is found another.
"""

from __future__ import annotations

import ast
import functools
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import torch

from nnsight_hpc.execution.parsing import parse, without_source
from nnsight_hpc.wire.errors import InvalidGraph

if TYPE_CHECKING:
    from collections.abc import Callable

    from nnsight_hpc.execution.parsing import Parsed


def innermost(function: Callable[..., Any]) -> FunctionType:
    """The Python function that a callable runs in the end; raises `InvalidGraph` where there is none."""
    inside = plain(function)
    while (index := decorated(inside)) is not None:
        inside = _cell(inside, index)
    return inside


def plain(function: Callable[..., Any]) -> FunctionType:
    """The Python function of a method, a partial or a callable object; raises `InvalidGraph` for anything else."""
    if isinstance(function, FunctionType):
        return function
    if isinstance(function, MethodType):
        return plain(function.__func__)
    if isinstance(function, functools.partial):
        return plain(function.func)
    if isinstance(function, torch.nn.Module):
        raise InvalidGraph(
            f"the operation calls a module, {type(function).__name__}",
            next="modules have a source of their own: use that module's .source",
        )
    method = getattr(type(function), "__call__", None)  # noqa: B004 - the method is wanted
    if not isinstance(function, type) and isinstance(method, FunctionType):
        return method
    name = getattr(function, "__qualname__", type(function).__qualname__)
    raise without_source(name, "it is a class" if isinstance(function, type) else "it is not written in Python")


def decorated(function: FunctionType) -> int | None:
    """Which cell of a wrapper's closure holds the function that it decorates and calls; None for other functions."""
    inside = getattr(function, "__wrapped__", None)
    names = function.__code__.co_freevars
    indices = [i for i in range(len(names)) if isinstance(inside, FunctionType) and _cell(function, i) is inside]
    if not indices:
        return None
    return indices[0] if names[indices[0]] in parse(function.__code__).called else None


def _cell(function: FunctionType, index: int) -> Any:
    assert function.__closure__ is not None, "a function with free variables has a closure"
    try:
        return function.__closure__[index].cell_contents
    except ValueError:  # a variable that is not bound yet
        return None


def callee(function: Callable[..., Any] | None, name: str) -> Callable[..., Any] | None:
    """What the operation `name` of `function` calls; None where only a run of the model shows it."""
    assert function is not None, "asked for known functions only"
    inside = innermost(function)
    parsed = parse(inside.__code__)
    parsed.require([name])
    expression = parsed.callees[name]
    if expression is None:
        raise InvalidGraph(f"{name} is an assignment: it calls nothing", next="nested source is for calls")
    known = {n: _cell(inside, i) for i, n in enumerate(inside.__code__.co_freevars)}
    if isinstance(function, MethodType):
        known[inside.__code__.co_varnames[0]] = function.__self__
    try:
        found: Callable[..., Any] = _evaluate(expression, inside, parsed, known)
    except Exception:  # noqa: BLE001 - the model's own expressions, out of their place, may raise anything
        return None
    return found


def _evaluate(expression: ast.expr, function: FunctionType, parsed: Parsed, known: dict[str, Any]) -> Any:
    """An expression of the function, before it runs; a local variable that is called has the last value that can be had.

    A function that is looked up in the forward (an attention implementation, by the model's config) is found this way.
    """
    local = {*function.__code__.co_varnames, *function.__code__.co_cellvars} - known.keys()
    if isinstance(expression, ast.Name) and expression.id in local:
        for value in reversed(parsed.assigned.get(expression.id, [])):
            try:
                return _evaluate(value, function, parsed, known)
            except Exception:  # noqa: BLE001, S112 - then an earlier assignment counts
                continue
    if unknown := local & {node.id for node in ast.walk(expression) if isinstance(node, ast.Name)}:
        raise NameError(f"{unknown} are known only while the function runs")
    code = compile(ast.Expression(expression), function.__code__.co_filename, "eval")
    return eval(code, function.__globals__, known)  # noqa: S307 - the model's own code, with nothing of a user's in it
