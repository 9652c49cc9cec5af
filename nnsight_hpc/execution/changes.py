"""Entries put into a module's own tables (hooks, a forward) for as long as a forward lasts, and taken out again for certain.

What is to be undone is noted before it is done, and undoing twice is as undoing once. So an interrupt may strike at any line,
also while something is undone: who started the run undoes what is left.
"""

from __future__ import annotations

from typing import Any

_NOTHING = object()


class Changes:
    """Changed entries of dicts, with what stood there before."""

    def __init__(self) -> None:
        self._before: list[tuple[dict[Any, Any], Any, Any]] = []

    def put(self, table: dict[Any, Any], key: Any, value: Any) -> None:
        """Set an entry until it is undone."""
        self._before.append((table, key, table.get(key, _NOTHING)))
        table[key] = value

    def keep(self, table: dict[Any, Any], key: Any) -> None:
        """Note an entry that somebody else is about to change, who will put it back unless interrupted."""
        self._before.append((table, key, table.get(key, _NOTHING)))

    def undo(self) -> None:
        """Put everything back as it was, the last change first."""
        while self._before:
            table, key, before = self._before[-1]
            if before is _NOTHING:
                table.pop(key, None)
            else:
                table[key] = before
            self._before.pop()
