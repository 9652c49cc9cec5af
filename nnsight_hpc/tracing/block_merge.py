"""What a name or expression is after a conditional or loop that the worker decides."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NoReturn

from nnsight_hpc.graph.build import MERGE
from nnsight_hpc.tracing.lines import users_line
from nnsight_hpc.tracing.value import Value
from nnsight_hpc.wire.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import FrameType

PLAIN = frozenset({type(None), bool, int, float, complex, str, type(...), range})


class _Unbound:
    def __repr__(self) -> str:
        return "<a name that is not bound>"


UNBOUND = _Unbound()


class Undecided:
    """In the place of an object that is no value, and that differs with the branch taken: whatever uses it raises."""

    def __init__(self, name: str) -> None:
        self._name, self._line = name, users_line()

    def _refuse(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        raise InvalidInput(
            f"what {self._name!r} is depends on a value, and it cannot be in a graph",
            where=str(users_line()),
            why=f"it was assigned at {self._line}, where the model decides what is run",
            next="choose between values (tensors, numbers, lists of them), or use it inside the branch",
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse()

    __call__ = __getitem__ = __iter__ = __bool__ = __len__ = __add__ = __radd__ = __mul__ = __rmul__ = _refuse


def opened(value: Value) -> ExitStack:
    """Record in the block that `value` opened until the stack is closed."""
    stack = ExitStack()
    stack.enter_context(value.recorder.inside(value))
    stack.enter_context(value.recorder.scope())
    return stack


def names_in(frame: FrameType, names: Iterable[str]) -> dict[str, Any]:
    """What names of a running function, or of its globals, are now; `UNBOUND` for those that are not bound."""
    code, own = frame.f_code, frame.f_locals
    local = {*code.co_varnames, *code.co_cellvars, *code.co_freevars}
    return {name: (own if name in local else frame.f_globals).get(name, UNBOUND) for name in names}


def after_branches(condition: Value, first: Any, second: Any, name: str) -> Any:
    """What `name` is after a conditional that left it as `first` where the condition is true, and else as `second`."""
    if second is UNBOUND or first is UNBOUND:
        return first if second is UNBOUND else second
    if not same(first, second) and not (recordable(first) and recordable(second)):
        return Undecided(name)
    return merged(condition, first, second)


def merged(condition: Value, first: Any, second: Any) -> Any:
    """`first` where the condition is true, or else `second`; saved if one of them is."""
    if same(first, second):
        return first
    recorder = condition.recorder
    value = recorder.record(MERGE, condition, first, second)
    if any(item.saved is not None for item in (*values_in(first), *values_in(second))):
        kept = [replaced((side,), _as_saved)[0] for side in (first, second)]
        value.saved = recorder.save(recorder.record(MERGE, condition, *kept))
    return value


def recordable(item: Any) -> bool:
    """Whether a graph can hold it."""
    kind = type(item)
    if kind in (list, tuple):
        return all(map(recordable, item))
    if kind is dict:
        return all(type(key) is str and recordable(entry) for key, entry in item.items())
    return kind in PLAIN or kind is Value or hasattr(kind, "__array__") or _is_torch(item)


def values_in(item: Any) -> list[Value]:
    """The values in plain containers."""
    found: list[Value] = []

    def note(value: Value) -> Value:
        found.append(value)
        return value

    replaced((item,), note)
    return found


def replaced(item: Any, replace: Callable[[Value], Any]) -> Any:
    """Plain containers made anew with other values in them."""
    kind = type(item)
    if kind is Value:
        return replace(item)
    if kind in (list, tuple):
        return kind(replaced(entry, replace) for entry in item)
    if kind is dict:
        return {key: replaced(entry, replace) for key, entry in item.items()}
    return item


def _as_saved(value: Value) -> Value:
    return value if value.saved is None else Value(value.recorder, value.saved)


def same(first: Any, second: Any) -> bool:
    if first is second:
        return True
    kind = type(first)
    if kind is Value and type(second) is Value:
        return bool(first.recorder is second.recorder and first.node == second.node and first.saved == second.saved)
    return kind is type(second) and kind in PLAIN and bool(first == second)


def _is_torch(item: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(item, torch.dtype | torch.device)
