"""Ways to kill a process at a step that is counted, and not timed."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

_CHANGES = frozenset({"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate"})
"""Audit events: before each, the interpreter tells the name of what it is about to do, and the file."""
_CALLS = ("pwrite", "fsync", "fdatasync", "ftruncate")
"""What is done to files that are open, of which there are no events."""


def at_each_step(folder: str, step: Callable[[], None]) -> None:
    """Call `step` before everything that this process does to files below `folder`, and to files that are open."""

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event in _CHANGES and isinstance(args[0], str | os.PathLike) and os.fspath(args[0]).startswith(folder):
            step()

    sys.addaudithook(watch)
    for name in _CALLS:
        setattr(os, name, _after(step, getattr(os, name)))


def _after(step: Callable[[], None], call: Callable[..., Any]) -> Callable[..., Any]:
    def both(*args: Any) -> Any:
        step()
        return call(*args)

    return both
