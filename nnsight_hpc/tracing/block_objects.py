"""Python's own objects in code that a value decides: those of before cannot be changed there, those made there can."""

from __future__ import annotations

import sys
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any

from nnsight_hpc.tracing.lines import users_line
from nnsight_hpc.wire.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import FrameType

_MOST = 100_000
"""The most objects that are looked at; those near to the names come first."""
_ATOMS = (type(None), bool, int, float, complex, str, bytes, type(...), range)
_CLOSED = (type, ModuleType, FunctionType, BuiltinFunctionType, MethodType)
_ADDS = tuple(
    f"__i{name}__"
    for name in (
        "add",
        "sub",
        "mul",
        "truediv",
        "floordiv",
        "mod",
        "pow",
        "matmul",
        "and",
        "or",
        "xor",
        "lshift",
        "rshift",
    )
)


class Objects:
    """The branches and loops of a value that are being recorded, each with the names as they were before it."""

    def __init__(self) -> None:
        self._names: list[dict[str, Any]] = []
        self._known: list[set[int] | None] = []

    def open(self, frame: FrameType) -> None:
        self._names.append({**frame.f_globals, **frame.f_locals})
        self._known.append(None)

    def close(self) -> None:
        self._names.pop()
        self._known.pop()

    def owner(self, item: Any, root: Any = None) -> Any:
        """An object whose attribute or entry is about to be changed; refused if it was there before a value decided."""
        if self._names and not _is_ours(item) and (self._is_known(item) or (root is not None and self._is_known(root))):
            _refuse(item)
        return item

    def added_to(self, item: Any) -> None:
        """``item += …`` and the like, which change some objects in place."""
        if self._names and not _is_ours(item) and any(hasattr(type(item), name) for name in _ADDS):
            self.owner(item)

    def _is_known(self, item: Any) -> bool:
        if _is_ours(item) or isinstance(item, (*_ATOMS, ModuleType)):
            return False
        known = self._known[-1]
        if known is None:
            known = self._known[-1] = _reached(self._names[-1].values())
        return id(item) in known


def _refuse(item: Any) -> None:
    raise InvalidInput(
        f"a {type(item).__name__} is changed where a value decides, and that cannot be recorded",
        where=str(users_line()),
        why="each branch, and one pass of the loop, is recorded before the model runs: the change would be made in any case",
        next="use a local list or name in the block, and assign it after the block; or tracer.list(), tracer.dict()",
    )


def _reached(items: Iterable[Any]) -> set[int]:
    """The ids of what is reached from `items` by entries and attributes."""
    found: set[int] = set()
    level = [*items]
    while level and len(found) < _MOST:
        new = [
            item
            for item in {id(item): item for item in level if not isinstance(item, _ATOMS)}.values()
            if id(item) not in found
        ]
        found.update(map(id, new))
        level = [inner for item in new for inner in _inside(item)]
    return found


def _inside(item: Any) -> Iterable[Any]:
    if isinstance(item, _CLOSED) or _is_ours(item) or _is_torch(item):
        return ()
    inner: list[Any] = []
    if isinstance(item, dict):
        inner += dict.values(item)
    elif isinstance(item, list | tuple | set | frozenset) or type(item).__name__ == "deque":
        inner += item
    return [*inner, *getattr(item, "__dict__", {}).values()]


def _is_torch(item: Any) -> bool:
    return type(item).__module__.partition(".")[0] in ("torch", "numpy", "transformers") or _is_module(item)


def _is_module(item: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(item, torch.nn.Module)


def _is_ours(item: Any) -> bool:
    return any(kind.__module__.partition(".")[0] == "nnsight_hpc" for kind in type(item).__mro__)
