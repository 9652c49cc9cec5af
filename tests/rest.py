"""How little of a core processes use at rest."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import psutil


def shares_at_rest(
    processes: Sequence[psutil.Process], limit: float, seconds: float = 5.0, windows: int = 5
) -> list[float]:
    """The share of a core that each process uses: the least of some windows, which end when all keep to `limit`.

    One that polls too often does so in all of them; what the neighbours of a wake-up cost it on a busy machine passes.
    """
    least = [float("inf")] * len(processes)
    for _ in range(windows):
        least = [min(pair) for pair in zip(least, _shares(processes, seconds), strict=True)]
        if max(least) < limit:
            break
    return least


def _shares(processes: Sequence[psutil.Process], seconds: float) -> list[float]:
    before, begun = [_used(process) for process in processes], time.monotonic()
    time.sleep(seconds)
    passed = time.monotonic() - begun
    return [(_used(process) - used) / passed for process, used in zip(processes, before, strict=True)]


def _used(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system
