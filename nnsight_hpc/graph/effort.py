"""How much work may go into a graph before anything runs, and who is asked meanwhile whether it is still wanted.

Most documents take a few steps for each node. Some that are valid take many more (thousands of points and changes of one
memory): they are refused when they have taken too many, and given up when nobody waits for them any more.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nnsight_hpc.graph.limits import MAX_WORK
from nnsight_hpc.wire.errors import InvalidGraph, RequestCancelled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_EVERY = 100_000
"""Steps, of about a microsecond each, between two looks."""


class _Spent(threading.local):
    """What one thread has spent."""

    steps, limit, look = 0, 0, _EVERY
    cancelled: Callable[[], bool] | None = None


_spent = _Spent()


@contextmanager
def effort(cancelled: Callable[[], bool] | None = None) -> Iterator[None]:
    """While it lasts, `spend` counts; what is within another counts with that.

    Raises
    ------
    InvalidGraph
        More than `MAX_WORK` steps were spent.
    RequestCancelled
        `cancelled`, which is asked now and then, said so.
    """
    if _spent.limit:
        yield
        return
    _spent.steps, _spent.limit, _spent.look, _spent.cancelled = 0, MAX_WORK, _EVERY, cancelled
    try:
        yield
    finally:
        _spent.limit, _spent.cancelled = 0, None


def spend(steps: int) -> None:
    """Count so many steps, each of about a microsecond."""
    _spent.steps += steps
    if _spent.steps > _spent.look:
        _look()


def _look() -> None:
    _spent.look = _spent.steps + _EVERY
    if _spent.cancelled is not None and _spent.cancelled():
        raise RequestCancelled("the request was cancelled while its graph was read")
    if 0 < _spent.limit < _spent.steps:
        raise InvalidGraph(
            "the graph is too entangled",
            why=f"it takes more than {MAX_WORK} steps to find out in which order its nodes have to run",
            next="divide it among several requests; many changes of one value, or long lists of them, take most",
        )
