"""Wakes those who wait for a change of one thing: a request, a pool, a queue. Nothing polls."""

from __future__ import annotations

import asyncio
import math
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar
from weakref import WeakValueDictionary

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

T = TypeVar("T")
ANYTHING = ""
"""The key of whoever waits for any change at all."""


class Changes:
    """Events by key, alive only while somebody waits for them."""

    def __init__(self) -> None:
        self._events: WeakValueDictionary[str, asyncio.Event] = WeakValueDictionary()
        self._closed = False

    def event(self, key: str) -> asyncio.Event:
        """Set at the next change of `key`."""
        return self._events.setdefault(key, asyncio.Event())

    def announce(self, key: str) -> None:
        for one in (key, ANYTHING):
            event = self._events.pop(one, None)
            if event is not None:
                event.set()

    def close(self) -> None:
        """Send everybody home: the daemon stops."""
        self._closed = True
        for key in list(self._events):
            self.announce(key)

    async def wait(
        self,
        key: str,
        read: Callable[[], Awaitable[T]],
        enough: Callable[[T], bool],
        seconds: float,
        *,
        every: float = math.inf,
    ) -> T:
        """What `read` gives as soon as it is `enough`, or after `seconds`.

        It is read again at each change of `key`, and every so many seconds, for what changes without a word.
        """
        deadline = asyncio.get_running_loop().time() + seconds
        while True:
            event = self.event(key)  # before reading, so that no change is missed
            value = await read()
            left = deadline - asyncio.get_running_loop().time()
            if enough(value) or left <= 0 or self._closed:
                return value
            with suppress(TimeoutError):
                await asyncio.wait_for(event.wait(), min(left, every))
