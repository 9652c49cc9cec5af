"""Bytes from here to there: the one loop that bridge, transports and connection share use. Blocks; no CPU when idle."""

from __future__ import annotations

from contextlib import suppress
from threading import Thread
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCK = 1 << 18


def copy(read: Callable[[int], bytes], write: Callable[[bytes], object], at_end: Callable[[], object]) -> None:
    """Hand what `read` gives to `write` until there is no more or either fails, then call `at_end`.

    A failure is how the other side's going shows itself; whoever waits for an answer sees the end of the stream.
    """
    with suppress(OSError, EOFError):
        while data := read(BLOCK):
            write(data)
    with suppress(OSError, EOFError):  # it may be gone already
        at_end()


def copying(read: Callable[[int], bytes], write: Callable[[bytes], object], at_end: Callable[[], object]) -> Thread:
    """`copy` in a thread of its own, which does not keep the program alive."""
    thread = Thread(target=copy, args=(read, write, at_end), daemon=True, name="relay")
    thread.start()
    return thread
