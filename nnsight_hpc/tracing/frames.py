"""The researcher's frames: which line made a node, and which of their names get the real values after a block."""

from __future__ import annotations

import ctypes
import functools
import linecache
import os
import sys
from typing import TYPE_CHECKING, Any, TypeVar

from nnsight_hpc.graph.nodes import Source

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

T = TypeVar("T")
_CONTAINERS = frozenset({list, tuple, dict})
_OURS = ("nnsight_hpc.tracing", "torch", "einops")


def users_frame() -> FrameType:
    """The innermost frame that is neither ours nor torch's."""
    frame = sys._getframe(1)  # noqa: SLF001 - the documented way to a caller's frame
    while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
    return frame


def users_line() -> Source:
    """The line that the researcher's code is at, its file relative to the working folder where it lies below it."""
    frame = users_frame()
    file = frame.f_code.co_filename
    here = f"{os.getcwd()}{os.sep}"  # noqa: PTH109 - at every operation, and a Path takes ten times as long
    text = linecache.getline(file, frame.f_lineno, frame.f_globals).strip()
    return Source(file.removeprefix(here), frame.f_lineno, text[:200])


@functools.cache
def _is_ours(module: str) -> bool:
    return any(module == name or module.startswith(name + ".") for name in _OURS)


def named(frame: FrameType, kind: type[T]) -> list[tuple[str, T]]:
    """What is of type `kind` in the frame's names and in the lists, tuples and dicts under them, with how it is reached."""
    found: list[tuple[str, T]] = []

    def note(value: T, name: str) -> T:
        found.append((name, value))
        return value

    for name, value in dict(frame.f_locals).items():
        _walk(value, name, kind, note, set())
    return found


def bind(frame: FrameType, kind: type[T], replace: Callable[[T], Any]) -> None:
    """Put what `replace` makes of each value of type `kind` in its place: a name of the frame, or a place in its containers."""
    for name, value in dict(frame.f_locals).items():
        new = _walk(value, name, kind, lambda item, _name: replace(item), set())
        if new is not value:
            frame.f_locals[name] = new
            if sys.version_info < (3, 13):  # PEP 667: from 3.13 on f_locals writes through
                ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(frame), ctypes.c_int(0))


def _walk(value: Any, name: str, kind: type[T], visit: Callable[[T, str], Any], seen: set[int]) -> Any:
    """Visit what is in plain containers; lists and dicts are changed in place, tuples made anew where something changed."""
    if type(value) is kind:
        return visit(value, name)
    if type(value) not in _CONTAINERS or id(value) in seen:
        return value
    seen.add(id(value))
    looked_at = {*_CONTAINERS, kind}
    places = value.items() if isinstance(value, dict) else enumerate(value)
    found = [(key, item) for key, item in places if type(item) in looked_at]  # a corpus of a million strings is no work
    new = {key: _walk(item, f"{name}[{key!r}]", kind, visit, seen) for key, item in found}
    changed = {key: new[key] for key, item in found if new[key] is not item}
    if isinstance(value, tuple):
        return tuple(changed.get(index, item) for index, item in enumerate(value)) if changed else value
    for key, item in changed.items():
        value[key] = item
    return value
