"""``python -m mpi4py -m tests.parallel.life WHAT FOLDER``: a replica in small, to which something happens.

Rank 0 leads the request WHAT (or several, with commas between), and one more. Each rank writes its last words to
``FOLDER/last-RANK`` and what it did to ``FOLDER/did-RANK``.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

from nnsight_hpc.parallel import Guard, Lockstep, Watchdog, World, form_group, join

LIMIT = 5.0
"""Seconds: longer than a busy machine keeps a rank from its core."""


def happen(what: str) -> None:
    """What happens to the last rank (to the leader, for `leader …`) in the middle of a request."""
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if what == "blocked":
        lock = threading.Lock()
        lock.acquire()
        lock.acquire()
    if what == "computes":
        end = time.monotonic() + 1.5 * LIMIT
        while time.monotonic() < end:
            torch.ones(200, 200) @ torch.ones(200, 200)
    if what == "rests":
        time.sleep(0.3 * LIMIT)


def begin(folder: Path, limit: float) -> tuple[World, Guard, dist.ProcessGroup]:
    """Join the world, watched; each rank's last words go to ``FOLDER/last-RANK``."""
    torch.set_num_threads(1)

    def last_words(error: Exception) -> None:
        (folder / f"last-{rank}").write_text(str(error))

    rank = -1
    world = join(last_words)
    rank = world.rank
    guard = Guard(world)
    group = form_group(world, guard)
    Watchdog(world, guard.progress, last_words, limit=limit)
    return world, guard, group


def main(to_happen: str, folder: Path) -> None:
    world, guard, _ = begin(folder, LIMIT)
    rank = world.rank
    groups = [dist.new_group([0, 1]), dist.new_group([world.size - 2, world.size - 1])]
    affected = 0 if to_happen.startswith("leader ") else world.size - 1

    def handler(payload: memoryview) -> float:
        dist.all_reduce(torch.ones(1))
        what = bytes(payload).decode().removeprefix("leader ")
        if rank == affected:
            happen(what)
        if what == "at odds" and rank < 2:  # each waits in a group of its own
            dist.all_reduce(torch.ones(1), group=groups[rank])
        total = torch.ones(1)
        dist.all_reduce(total)
        return total.item()

    with Lockstep(world, guard, handler) as lockstep:
        if rank == 0:
            did = [lockstep.lead(what.encode()) for what in (*to_happen.split(","), "nothing")]
            if to_happen == "leader raises":
                raise KeyError("the leader's own mistake")
            if to_happen == "leader vanishes":
                os._exit(0)
            (folder / "did-0").write_text(str(did))
        else:
            lockstep.follow()
            (folder / f"did-{rank}").write_text("followed to the end")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
