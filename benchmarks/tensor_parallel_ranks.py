"""One rank of `tensor_parallel.py`: ``mpirun -np 2 python -m mpi4py tensor_parallel_ranks.py FILE QUICK``.

Rank 0 writes microseconds to FILE: ``{"all_reduce": [[dtype, bytes, mpi4py, ours, gloo], …], "word", "integers"}``.
"""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from nnsight_hpc.parallel import Guard, World, form_group, join
from nnsight_hpc.parallel.mpi import MPI
from nnsight_hpc.parallel.nccl import shared_store
from nnsight_hpc.parallel.words import Channel, Operation, Step, Word

if TYPE_CHECKING:
    from collections.abc import Callable

SIZES = tuple(4**n << 10 for n in range(1, 8))  # 4 KiB to 16 MiB


def best(world: World, seconds: float, ways: list[Callable[[], Any]]) -> list[float]:
    """Microseconds of the fastest call of each way; the ways in turn, for so many seconds of all ranks."""
    fastest, end = [float("inf")] * len(ways), time.monotonic() + seconds
    while world.comm.bcast(time.monotonic() < end):
        for number, way in enumerate(ways):
            world.comm.Barrier()
            begun = time.perf_counter()
            way()
            fastest[number] = min(fastest[number], 1e6 * (time.perf_counter() - begun))
    return fastest


def all_reduces(world: World, gloo: dist.Backend, dtype: torch.dtype, size: int, seconds: float) -> list[float]:
    # Each way has memory of its own: gloo's threads would leave it in another core's cache.
    ours, theirs = torch.zeros(2, size // dtype.itemsize, dtype=dtype)
    buffer, group = ours.float().numpy().copy(), dist.group.WORLD
    ways = [
        lambda: world.comm.Allreduce(MPI.IN_PLACE, [buffer, MPI.FLOAT]),
        lambda: group.allreduce([ours]).wait(),
        lambda: gloo.allreduce([theirs]).wait(),
    ]
    return best(world, seconds, ways)


def words(world: World, guard: Guard, seconds: float) -> list[float]:
    channel, sent, received = Channel(world.comm, guard.progress), np.zeros(3, np.int32), np.zeros(3, np.int32)
    ways = [
        lambda: channel.exchange(Word.FINE, Step(Operation.ALL_REDUCE, 4096, 4)),
        lambda: world.comm.Allreduce(sent, received, op=MPI.MAX),
    ]
    return best(world, seconds, ways)


def main(file: str, quick: str) -> None:
    torch.set_num_threads(1)
    world = join(print)
    guard = Guard(world)
    form_group(world, guard)
    gloo = dist.ProcessGroupGloo(shared_store(world.comm), world.rank, world.size, timedelta(seconds=60))
    seconds = 0.5 if quick == "1" else 3.0
    measured = [
        [str(dtype).removeprefix("torch."), size, *all_reduces(world, gloo, dtype, size, seconds)]
        for dtype in (torch.float32, torch.bfloat16)
        for size in SIZES
    ]
    word, integers = words(world, guard, seconds)
    if world.rank == 0:
        Path(file).write_text(json.dumps({"all_reduce": measured, "word": word, "integers": integers}))
    gloo.shutdown()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
