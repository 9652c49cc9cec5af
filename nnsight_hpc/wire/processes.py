"""Whether a process on this host, known by its number, still runs."""

from __future__ import annotations

import math

import psutil


def is_alive(pid: int, *, born_before: float = math.inf) -> bool:
    """Whether `pid` runs: not its zombie, nor a process that got its number since (born later, in seconds of the epoch)."""
    try:
        process = psutil.Process(pid)
        return bool(process.create_time() <= born_before and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
