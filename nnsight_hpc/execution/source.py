"""The operations inside a module's forward: what they are, and a forward that hands chosen ones to a callback.

The forward is compiled anew from its own source with those operations alone rewritten, so nothing else costs anything,
and put on the module as an instance attribute while a context lasts. Globals, defaults, closure, file name and line
numbers are those of the original; decorators are put around it again. How operations are named: `parsing`.
"""

from __future__ import annotations
import __future__

import ast
import copy
import functools
import operator
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from types import CellType, CodeType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any, Protocol

import torch

from nnsight_hpc.execution.callables import callee, decorated, innermost, plain
from nnsight_hpc.execution.parsing import OPERATION, Namer, parse
from nnsight_hpc.graph.nodes import leaves
from nnsight_hpc.wire.errors import InvalidGraph

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    from nnsight_hpc.execution.parsing import Operation

_FUTURE = functools.reduce(
    operator.or_, (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
)
SLOTS = ("forward", "_old_forward")
"""Where a module has the forward that runs: below the hook that accelerate may have put around it, it is the second."""
_DATA = (torch.Tensor, int, float, complex, type(None), torch.dtype, torch.device, type(Ellipsis))


class Callback(Protocol):
    """Runs an operation: ``return function(*args, **kwargs)`` leaves everything as it is.

    `function` may be given other arguments, not be called at all, and its output may be replaced. `name` has colons where
    the operation is nested.
    """

    def __call__(
        self, name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], /
    ) -> Any: ...


@dataclass(frozen=True)
class Source:
    """The text of a function without its decorators, its first line's number in `file`, and its operations."""

    file: str
    line: int
    text: str
    operations: tuple[Operation, ...]


def operations_of(module: torch.nn.Module, nested: Iterable[str] = ()) -> tuple[Operation, ...]:
    """The operations of a module's forward, or of the function that one of them calls, in the order in which they run.

    Parameters
    ----------
    nested
        The names that lead to the function: ``("attention_interface_0",)`` is what that operation of the forward calls.

    Raises
    ------
    InvalidGraph
        There is no such operation, its function has no source, or is known only while the model runs.
    """
    source = source_of(module, nested)
    if source is None:
        raise InvalidGraph(
            f"what {':'.join(nested)} calls is not known yet",
            where=f"{type(module).__name__}.forward",
            why="the function is made while the model runs",
        )
    return source.operations


def by_module(paths: Iterable[str]) -> dict[str, frozenset[str]]:
    """The names of operations by the path of the module that they are in; each is given as ``path.of.module:operation``."""
    names: dict[str, frozenset[str]] = defaultdict(frozenset)
    for path in sorted(paths):
        module, _, name = path.partition(":")
        names[module] |= {name}
    return dict(names)


def source_of(module: torch.nn.Module, nested: Iterable[str] = ()) -> Source | None:
    """As `operations_of`, with the whole text; None where the function is known only while the model runs."""
    function: Callable[..., Any] | None = forward_of(module)
    for name in nested:
        function = callee(function, name)
        if function is None:
            return None
    assert function is not None, "forward_of gives a function"
    parsed = parse(innermost(function).__code__)
    return Source(parsed.file, parsed.line, parsed.text, parsed.operations)


def forward_of(module: torch.nn.Module) -> Callable[..., Any]:
    """What runs when the module is called: its forward, below the hook that accelerate may have put around it."""
    function: Callable[..., Any] = vars(module).get("_old_forward", module.forward)
    return function


@contextmanager
def instrumented(module: torch.nn.Module, names: Collection[str], callback: Callback) -> Iterator[None]:
    """While this lasts, `callback` runs those operations of the module's forward that `names` has.

    Data may be replaced by data only: a function, a string, or an object that an operation gets or gives cannot be
    replaced by another, since in a model they choose which code runs.

    Parameters
    ----------
    names
        Operations as `operations_of` lists them, nested ones after a colon: ``attention_interface_0:query_transpose_0``.

    Raises
    ------
    InvalidGraph
        An operation that the forward does not have, or a forward without source; for a nested operation whose function
        is known only while the model runs, out of the model's forward.
    """
    function, own = forward_of(module), vars(module)
    slot = "_old_forward" if "_old_forward" in own else "forward"
    for name in names:
        _check(function, name.split(":"))
    rewritten, before = _rewritten(function, frozenset(names), callback, ""), own.get(slot)
    try:
        own[slot] = rewritten
        yield
    finally:
        if before is None:
            own.pop(slot, None)
        else:
            own[slot] = before


def _check(function: Callable[..., Any], path: list[str]) -> None:
    """Raise `InvalidGraph` unless the operations of a path are there, as far as can be told before the model runs."""
    inside: Callable[..., Any] | None = function
    for name in path[:-1]:
        inside = callee(inside, name)
        if inside is None:
            return
    assert inside is not None, "the loop ends at the first that is not known"
    parse(innermost(inside).__code__).require(path[-1:])


def _rewritten(
    function: Callable[..., Any], names: frozenset[str], callback: Callback, prefix: str
) -> Callable[..., Any]:
    """A callable like `function` whose operations in `names` go through the callback."""
    if isinstance(function, functools.partial):
        inner = _rewritten(function.func, names, callback, prefix)
        return functools.partial(inner, *function.args, **function.keywords)
    if isinstance(function, MethodType):
        return MethodType(_rewritten(function.__func__, names, callback, prefix), function.__self__)
    inside = plain(function)
    if inside is not function:
        return MethodType(_rewritten(inside, names, callback, prefix), function)
    cells = dict(zip(inside.__code__.co_freevars, inside.__closure__ or (), strict=True))
    if OPERATION in cells:
        raise InvalidGraph(
            f"the operations of {inside.__qualname__} are handed on already",
            why="its module runs with its operations traced, or it is a function inside a forward that does",
            next="name its operations as those of the function that it stands in",
        )
    index = decorated(inside)
    if index is not None:
        name = inside.__code__.co_freevars[index]
        wrapped = _rewritten(cells[name].cell_contents, names, callback, prefix)
        return _like(inside, inside.__code__, {**cells, name: CellType(wrapped)}, wrapped)
    below = _below(names)
    parse(inside.__code__).require(below)
    code = _compiled(inside.__code__, frozenset(below))
    return _like(inside, code, {**cells, OPERATION: CellType(_operation(below, callback, prefix))}, inside)


def _like(
    function: FunctionType, code: CodeType, cells: dict[str, CellType], wrapped: Callable[..., Any]
) -> FunctionType:
    """A function with another code or closure, and all else of `function`; it says that it wraps `wrapped`."""
    closure = tuple(cells.get(name) or CellType() for name in code.co_freevars)
    new = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    new.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(new, function)
    new.__wrapped__ = wrapped  # type: ignore[attr-defined]
    return new


def _below(names: frozenset[str]) -> dict[str, set[str]]:
    """For each operation the nested ones; "" stands for the operation itself."""
    below: dict[str, set[str]] = defaultdict(set)
    for name in names:
        first, _, rest = name.partition(":")
        below[first].add(rest)
    return dict(below)


@functools.lru_cache(maxsize=1024)
def _compiled(code: CodeType, wanted: frozenset[str]) -> CodeType:
    """The function's code with the operations in `wanted` rewritten.

    It is compiled inside a class, for ``__class__`` and private names, inside a function whose parameters are the free
    variables. Neither is ever run: only the code object in the middle is taken.
    """
    parsed = parse(code)
    definition = copy.deepcopy(parsed.definition)
    Namer(parsed.called, wanted).visit_definition(definition)
    arguments = definition.args
    arguments.defaults = [ast.Constant(None) for _ in arguments.defaults]  # the function has its own already
    arguments.kw_defaults = [None if default is None else ast.Constant(None) for default in arguments.kw_defaults]
    owner = ast.ClassDef(_class_of(code), [], [], [definition], [])
    free = [ast.arg(name) for name in (*code.co_freevars, OPERATION) if name != "__class__"]
    outer = ast.FunctionDef("_", ast.arguments([], free, None, [], [], None, []), [owner], [])
    tree = ast.fix_missing_locations(ast.Module([ast.copy_location(outer, definition)], []))
    module = compile(tree, code.co_filename, "exec", code.co_flags & _FUTURE, dont_inherit=True)
    found = next(inside for inside in _codes(module) if inside.co_name == code.co_name)
    return found.replace(co_qualname=code.co_qualname)


def _class_of(code: CodeType) -> str:
    """The class that the code was written in; for a plain function ``_``, a class in which no name is private."""
    parts = code.co_qualname.split(".")
    classes = [part for part, then in pairwise(parts) if "<locals>" not in {part, then}]
    return classes[-1] if classes else "_"


def _codes(code: CodeType) -> Iterator[CodeType]:
    """All code objects within one, outer ones first."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes(constant)


def _operation(below: dict[str, set[str]], callback: Callback, prefix: str) -> Callable[..., Any]:
    """What rewritten code calls in place of its operations."""

    def operation(name: str, function: Callable[..., Any] | None, /, *args: Any, **kwargs: Any) -> Any:
        function = _itself if function is None else function
        nested = frozenset(below[name] - {""})
        if nested:
            function = _rewritten(function, nested, callback, f"{prefix}{name}:")
        return (
            _handed(prefix + name, function, args, kwargs, callback) if "" in below[name] else function(*args, **kwargs)
        )

    return operation


def _itself(value: Any) -> Any:
    """What an assignment calls."""
    return value


def _handed(
    name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], callback: Callback
) -> Any:
    """Let the callback run an operation, and see to it that it replaces data only."""
    made: list[Any] = []

    def run(*given: Any, **named: Any) -> Any:
        _only_data(name, (given, named), (args, kwargs))
        made.append(function(*given, **named))
        return made[-1]

    output = callback(name, run, args, kwargs)
    _only_data(name, output, made)
    return output


def _only_data(name: str, new: Any, old: Any) -> None:
    """Raise `InvalidGraph` where `new` has what is neither data nor in `old`. A number may be a switch where one is there."""
    before = [*leaves(old)]
    switches = any(isinstance(leaf, bool) for leaf in before)
    for leaf in leaves(new):
        data = (
            isinstance(leaf, _DATA) and not isinstance(leaf, bool) and not (switches and isinstance(leaf, int | float))
        )
        same = (
            leaf is one or (type(leaf) is type(one) and isinstance(leaf, str | int | float) and leaf == one)
            for one in before
        )
        if not data and not any(same):
            raise InvalidGraph(
                f"a {type(leaf).__name__} cannot be set at the operation {name}",
                why="in a model strings, switches, functions and objects choose which code runs; tensors can be set",
            )
