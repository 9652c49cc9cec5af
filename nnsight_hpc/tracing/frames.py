"""The researcher's frames: which line made a node, and which of their names get the real values after a block."""

from __future__ import annotations

import ctypes
import linecache
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnsight_hpc.graph.nodes import Source

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

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
    here = f"{Path.cwd()}{os.sep}"
    text = linecache.getline(file, frame.f_lineno, frame.f_globals).strip()
    return Source(file.removeprefix(here), frame.f_lineno, text[:200])


def _is_ours(module: str) -> bool:
    return any(module == name or module.startswith(name + ".") for name in _OURS)


def named(frame: FrameType, wanted: Callable[[Any], bool]) -> list[tuple[str, Any]]:
    """What the frame's names, and the lists, tuples and dicts under them, hold that is `wanted`, with how it is reached."""
    found: list[tuple[str, Any]] = []

    def note(value: Any, name: str) -> Any:
        if wanted(value):
            found.append((name, value))
        return value

    for name, value in dict(frame.f_locals).items():
        _walk(value, name, note, set())
    return found


def bind(frame: FrameType, replace: Callable[[Any], Any]) -> None:
    """Give each name of the frame, and each place in its lists, tuples and dicts, what `replace` makes of its value."""
    for name, value in dict(frame.f_locals).items():
        new = _walk(value, name, lambda item, _name: replace(item), set())
        if new is not value:
            frame.f_locals[name] = new
            if sys.version_info < (3, 13):  # PEP 667: from 3.13 on f_locals writes through
                ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(frame), ctypes.c_int(0))


def _walk(value: Any, name: str, visit: Callable[[Any, str], Any], seen: set[int]) -> Any:
    """Visit what is in plain containers; lists and dicts are changed in place, tuples made anew where something changed."""
    if type(value) not in (list, tuple, dict):
        return visit(value, name)
    if id(value) in seen:
        return value
    seen.add(id(value))
    if type(value) is tuple:
        items = tuple(_walk(item, f"{name}[{index}]", visit, seen) for index, item in enumerate(value))
        return items if any(a is not b for a, b in zip(items, value, strict=True)) else value
    places = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    for key, item in places:
        new = _walk(item, f"{name}[{key!r}]", visit, seen)
        if new is not item:
            value[key] = new
    return value
