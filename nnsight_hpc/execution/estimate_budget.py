"""How much memory a graph may take: a share of what is free now on the model's device."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import torch

SHARE = 0.8
"""The rest is for what is not counted: the allocator's gaps, other threads, the packing of results."""
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def memory_budget(device: torch.device) -> int:
    """Bytes that may be taken on `device` now.

    On a GPU that is what its driver and torch's own cache have free. On the CPU it is the least of what the machine has
    available, what is left of the process's cgroup (v2), and of the memory that Slurm gave the job on this node.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(SHARE * (free + cached))
    limits = [psutil.virtual_memory().available, _left_of_cgroup(), _left_of_job()]
    return max(0, int(SHARE * min(limit for limit in limits if limit is not None)))


def _left_of_cgroup() -> int | None:
    """What the process's cgroup may still take: the least of its own limit and those above it."""
    try:
        line = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return None
    root = Path("/sys/fs/cgroup")
    folder = root / line.removeprefix("0::").lstrip("/")
    left = [_left_of(part) for part in (folder, *folder.parents) if part.is_relative_to(root)]
    return min((bytes_ for bytes_ in left if bytes_ is not None), default=None)


def _left_of(folder: Path) -> int | None:
    try:
        limit = (folder / "memory.max").read_text().strip()
        return None if limit == "max" else int(limit) - int((folder / "memory.current").read_text())
    except (OSError, ValueError):
        return None


def _left_of_job() -> int | None:
    """What is left of the job's memory; Slurm gives it in MiB, and ends a job that takes more."""
    given = os.environ.get("SLURM_MEM_PER_NODE", "")
    return (int(given) << 20) - psutil.Process().memory_info().rss if given.isdigit() and int(given) else None


def in_words(bytes_: int) -> str:
    """A number of bytes for people: ``3.6 TiB``."""
    value, unit = float(bytes_), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.3g} {_UNITS[unit]}"
