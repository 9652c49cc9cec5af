"""Counts steps: a measure of what work costs that no other program disturbs."""

from __future__ import annotations

import gc
import itertools
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Iterator


class Steps:
    """How many functions were called, those of C included, and how many instructions SQLite has carried out."""

    def __init__(self) -> None:
        self._calls, self._instructions = itertools.count(), itertools.count()
        self.calls = self.instructions = 0

    def call(self, _frame: object, event: str, _argument: object) -> None:
        if event in ("call", "c_call"):
            next(self._calls)

    def instruct(self) -> bool:
        return next(self._instructions) < 0  # never: that would stop SQLite

    def end(self) -> None:
        self.calls, self.instructions = next(self._calls), next(self._instructions)


@contextmanager
def counted(connection: sqlite3.Connection | None = None) -> Iterator[Steps]:
    """Steps of this thread within the block, and of the connection in whatever thread."""
    steps = Steps()
    if connection is not None:
        connection.set_progress_handler(steps.instruct, 1)
    gc.collect()
    gc.disable()  # what it finalizes is of earlier tests
    sys.setprofile(steps.call)
    try:
        yield steps
    finally:
        sys.setprofile(None)
        gc.enable()
        if connection is not None:
            connection.set_progress_handler(None, 0)
        steps.end()


def calls(work: Callable[[], object]) -> int:
    """How many functions `work` calls."""
    with counted() as steps:
        work()
    return steps.calls
