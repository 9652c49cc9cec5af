"""How far a copy is, how fast it goes, and how long it will take; counted by several streams at once."""

from __future__ import annotations

import time
from threading import Lock
from typing import TYPE_CHECKING

from nnsight_hpc.client.tables import duration, size

if TYPE_CHECKING:
    from nnsight_hpc.client.progress import Progress

_SETTLED = 1.0
"""Seconds after which a rate means something."""


class Tally:
    """Bytes of a copy: those that are there, and of these the ones that came just now, by which the rate is told."""

    def __init__(self, total: int, progress: Progress) -> None:
        self.total, self._progress = total, progress
        self._there = self._came = 0
        self._began, self._lock, self._stopped = time.monotonic(), Lock(), False

    def came(self, count: int) -> None:
        """So many bytes have come. Raises `Stopped` once `stop` was called."""
        if self._stopped:
            raise Stopped
        with self._lock:
            self._came += count
            self._show()

    def found(self, count: int) -> None:
        """So many bytes are there from an earlier run; a negative number takes back what turned out to be damaged."""
        with self._lock:
            self._there += count
            self._show()

    def stop(self) -> None:
        """Have the streams end before their next block."""
        self._stopped = True

    def words(self) -> str:
        return f"{size(self._there + self._came)} of {size(self.total)}"

    def _show(self) -> None:
        lasted = time.monotonic() - self._began
        words = self.words()
        if self._came and lasted > _SETTLED:
            rate = self._came / lasted
            left = (self.total - self._there - self._came) / rate
            words += f", {size(rate)}/s, {duration(left)} left"
        self._progress.show(words, done=self._there + self._came, total=self.total)


class Stopped(Exception):
    """Another stream has met an error, or the user has pressed Ctrl-C."""
