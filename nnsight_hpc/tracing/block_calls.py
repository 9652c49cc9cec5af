"""Python's own functions in rewritten code, where what they are given is a value or holds some."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nnsight_hpc.graph.build import CARRIED, CHECK, FINAL, IF, LENGTH, LIST, MERGE, NEXT
from nnsight_hpc.tracing.block_loops import Over, Pass
from nnsight_hpc.tracing.block_merge import values_in
from nnsight_hpc.tracing.lines import users_line
from nnsight_hpc.tracing.value import Value
from nnsight_hpc.wire.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_SIZES = frozenset({"attribute", "Tensor.size", "operator.getitem", "operator.add"})
"""What gives a size, or a part of one."""
_COMPREHENSION = "write a list comprehension; or use validate=True, under which lengths are known and Python runs it"
_INSTEAD = {
    "a `match`": "write `if` and `elif`",
    "an `if` with a `raise` in it": "write `assert condition, message`, which is checked while the graph runs",
    "a dict comprehension": _COMPREHENSION,
    "a set comprehension": _COMPREHENSION,
    "a `min` or `max` with keywords": "write a loop with an `if`",
}


def called(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of a function that looks into what it is given, or decides by it."""
    first = args[0] if args else None
    if function in (min, max):
        return _extreme(function, args, kwargs)
    if function in (any, all):
        return _any_or_all(function, first)
    if type(first) is not Value:
        return function(*args, **kwargs)
    if function in (list, tuple):
        return first
    if function is len:
        known: Any = None if first.fake is None else first.recorder.shadow.value(first.node)
        return len(known) if hasattr(known, "__len__") else first.recorder.record(LENGTH, first)
    if function is sum:
        return _folded(first, args[1] if len(args) > 1 else kwargs.get("start", 0), "operator.add")
    return _known(function, args, kwargs)


def _known(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function; one of torch that would look into a list or size is recorded."""
    name = getattr(function, "__name__", "")
    if getattr(sys.modules.get("torch"), name, None) is function:
        return args[0].recorder.record(f"torch.{name}", *args, **kwargs)
    return function(*args, **kwargs)


@dataclass(frozen=True, slots=True)
class Star:
    """``*items`` in a call or list."""

    items: Any

    @property
    def open(self) -> bool:
        """Whether nobody knows yet how many there are."""
        return type(self.items) is Value and self.items.fake is None


def spread(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``x.view(*x.shape[:-1], 2, 4)``; the sizes are handed on as one where nobody knows yet how many there are."""
    if not any(type(arg) is Star and arg.open and _is_size(arg.items) for arg in args):
        return function(*_entries(args), **kwargs)
    whole: Any = ()
    for arg in args:
        part = arg.items if type(arg) is Star else (arg,)
        part = part if type(part) is Value else tuple(part)
        values = values_in([whole, part])
        whole = values[0].recorder.record("operator.add", whole, part) if values else whole + part
    return _known(function, (whole,), kwargs)


def listed(*entries: Any) -> Any:
    """``[*x, y]``, as a list of the worker where nobody knows yet how many entries `x` has."""
    found = next((entry.items for entry in entries if type(entry) is Star and entry.open), None)
    if found is None:
        return list(_entries(entries))
    made = found.recorder.record(LIST)
    for entry in entries:
        if type(entry) is not Star:
            made.append(entry)
        elif not entry.open:
            made.extend(entry.items)
        else:
            turn = Pass(entry.items)
            made.append(turn.item(Over(entry.items)))
            turn.end()
    return made


def check(condition: Value, message: list[Any] | None) -> None:
    """``assert condition, message``."""
    condition.recorder.record(CHECK, condition, *[p if values_in(p) else str(p) for p in message or ()])


def of_python(item: Any, what: str) -> Any:
    """What a statement that no graph has is decided by; a value is refused."""
    if type(item) in (Value, Over):
        raise InvalidInput(
            f"{what}, which a value decides, cannot be recorded",
            where=str(users_line()),
            why="what a value is, is known only where the graph runs",
            next=_INSTEAD[what],
        )
    return item


def _entries(items: tuple[Any, ...]) -> Iterator[Any]:
    for item in items:
        if type(item) is Star:
            yield from item.items
        else:
            yield item


def _is_size(value: Value) -> bool:
    """Whether a value is the shape of another, or a part of one."""
    node = value.recorder.builder.nodes[value.node]
    if node.op not in _SIZES:
        return False
    if node.op == "attribute":
        return bool(node.args[1] == "shape")
    return node.op == "Tensor.size" or _is_size(Value(value.recorder, node.args[0].id))


def _any_or_all(function: Callable[..., Any], items: Any) -> Any:
    op = "operator.or_" if function is any else "operator.and_"
    if type(items) is Value:
        return _folded(items, function is all, op, truths=True)
    rest = iter(items)
    for item in rest:
        if type(item) is Value:
            return _folded(item.recorder.record(LIST, item, *rest), function is all, op, truths=True)
        if bool(item) is (function is any):
            return function is any
    return function is all


def _extreme(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``min`` and ``max``: of two that are equal the first."""
    items = args[0] if len(args) == 1 else list(args)
    if type(items) is not Value:
        items = list(items)
        if not (values := values_in(items)):
            return function(items, **kwargs)
        items = values[0].recorder.record(LIST, *items)
    if kwargs:
        of_python(items, "a `min` or `max` with keywords")
    recorder = items.recorder
    first = recorder.record("operator.getitem", items, 0)
    turn = Pass(items)
    best = recorder.record(CARRIED, turn.loop, first)
    item = turn.item(Over(items))
    better = recorder.record(IF, recorder.record("operator.gt" if function is max else "operator.lt", item, best))
    recorder.record(NEXT, best, recorder.record(MERGE, better, item, best))
    return recorder.record(FINAL, turn.end(), best)


def _folded(items: Value, start: Any, op: str, *, truths: bool = False) -> Value:
    """What comes out when `op` is applied to `start` and the first element, to that and the next, and so on."""
    turn = Pass(items)
    recorder = turn.recorder
    so_far = recorder.record(CARRIED, turn.loop, start)
    item = turn.item(Over(items))
    if truths:
        item = recorder.record("operator.not_", recorder.record("operator.not_", item))
    recorder.record(NEXT, so_far, recorder.record(op, so_far, item))
    return recorder.record(FINAL, turn.end(), so_far)
