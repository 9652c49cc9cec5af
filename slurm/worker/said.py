"""What a running request says (`log`, `print`), on its way from the model's thread to the daemon."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from nnsight_hpc.wire.messages import LogLine, encode

if TYPE_CHECKING:
    from collections.abc import Callable

MOST = 1 << 20
"""Bytes that one attempt may say."""
LONGEST = 16 << 10
"""Characters of one line; what is more is cut."""
_PART = 128 << 10


class Said:
    """What one attempt at a request has said and the daemon does not have yet.

    `say` is for the model's thread, everything else for the one that sends.

    Parameters
    ----------
    attempt
        Which one; from the second on the first line says that the request runs again.
    wake
        Called when there is something to send after there was nothing.
    """

    def __init__(self, attempt: int, wake: Callable[[], None]) -> None:
        self._attempt, self._wake = attempt, wake
        self._lock = threading.Lock()
        self._unsent = bytearray()
        self._size = 0
        self._closed = False

    def say(self, text: str, source: str) -> None:
        """Take one line; beyond `MOST` bytes one last line says that there would be more."""
        if self._closed:
            return
        if not self._size and self._attempt > 1:
            self._add(
                f"(attempt {self._attempt}: the worker of the one before was lost, and the request runs again)", ""
            )
        cut = f" … ({len(text) - LONGEST} characters more)" if len(text) > LONGEST else ""
        self._add(text[:LONGEST] + cut, source)
        if self._size > MOST:
            self._closed = True
            self._add(f"(the log ends here: a request may say {MOST >> 20} MiB)", source)

    def close(self) -> None:
        """Take nothing more, and forget what was not sent: nobody wants it."""
        with self._lock:
            self._closed = True
            self._unsent.clear()

    def part(self) -> tuple[int, bytes] | None:
        """Some lines that are to be sent, and their place in the log; None when there are none."""
        with self._lock:
            end = self._unsent.rfind(b"\n", 0, _PART) + 1
            return (self._size - len(self._unsent), bytes(self._unsent[:end])) if end else None

    def has(self, size: int) -> None:
        """The daemon has the first `size` bytes of what was to be sent."""
        with self._lock:
            del self._unsent[:size]

    def _add(self, text: str, source: str) -> None:
        written = text.encode("utf-8", "replace").decode()  # what came in as bytes may be no Unicode
        line = encode(LogLine(text=written, source=source, time=time.time())) + b"\n"
        with self._lock:
            first = not self._unsent
            self._unsent += line
            self._size += len(line)
        if first:
            self._wake()
