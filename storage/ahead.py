"""One step of read-ahead: the next batch is prepared in a thread while the caller works with this one.

Two batches exist at a time, and no more: nothing queues up. The thread does one batch and then waits to be asked, so that
whoever drops the iterator, or is interrupted, waits for at most one batch; it never waits for the caller, so that no
program hangs at its end. In a forked child the thread does not exist, and closing the iterator there does nothing.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator

T = TypeVar("T")


def read_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items; each is taken from `items` while the one before it is in use. None ends it."""
    with ThreadPoolExecutor(1, thread_name_prefix="dataset-reader") as thread:
        following = thread.submit(next, items, None)
        while (item := following.result()) is not None:
            following = thread.submit(next, items, None)
            yield item
            del item  # it is the caller's alone while the one after next is made
