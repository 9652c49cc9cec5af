"""What a run takes in truth, looked at while it goes on: no estimate knows how often a loop over data passes."""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nnsight_hpc.execution.estimate_budget import in_words, memory_budget
from nnsight_hpc.wire.errors import InvalidGraph

if TYPE_CHECKING:
    from nnsight_hpc.graph.nodes import Node

_EVERY = 0.02
"""Seconds between two looks; one takes 20 us."""
SLACK = 1 << 30
"""Bytes by which a process may grow for other reasons: libraries that it loads, buffers that its allocator keeps."""


class Watch:
    """Stops a run that takes more than its budget. For one run; it counts from the first look.

    Parameters
    ----------
    budget
        Bytes that the run may take on `device`. In the machine's own memory it may take that, too, or what is free there.
    """

    def __init__(self, device: torch.device, budget: int) -> None:
        self._device = device
        host = budget if device.type != "cuda" else memory_budget(torch.device("cpu"))
        self._budgets = {"cpu": host + SLACK, device.type: budget + (0 if device.type == "cuda" else SLACK)}
        self._before: dict[str, int] = {}
        self._next = 0.0

    def look(self, node: Node) -> None:
        """Before `node` runs: raise `InvalidGraph` when the run has taken too much."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + _EVERY
        taken = {where: _taken(where, self._device) for where in self._budgets}
        self._before = self._before or taken
        for where, budget in self._budgets.items():
            if (grown := taken[where] - self._before[where]) > budget:
                raise InvalidGraph(
                    f"the run has taken {in_words(grown)} of memory; it was stopped at node {node.id} ({node.op})",
                    where=str(node.source or ""),
                    why=f"it may take {in_words(budget)}; how much it would take depends on data (passes of loops, lists)",
                    next="save or append less in loops, or divide the inputs among several requests",
                )


def _taken(where: str, device: torch.device) -> int:
    """Bytes of tensors on a GPU, or of this process in the machine's memory."""
    if where == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
