"""``python -m mpi4py -m tests.parallel.rank MODULE FILE``: one rank; rank 0 writes a line of JSON for each check."""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from nnsight_hpc.parallel import Guard, World, form_group, join
from nnsight_hpc.parallel.mpi import MPI, initialise
from tests.parallel.ranks import checks


@dataclass
class Rank:
    """What a check is given."""

    world: World
    guard: Guard
    group: dist.ProcessGroup | None
    healthy: tuple[torch.Tensor, ...] = ()


def main(module: str, file: str) -> None:
    torch.set_num_threads(1)
    shared = "NNH_SHARED_GPU" in os.environ
    world = joined_on_one_gpu() if shared else join(print)
    if world.device.type != "cpu":
        torch.set_default_device(world.device)
    guard = Guard(world)
    rank = Rank(world, guard, None if shared else form_group(world, guard))
    with Path(file).open("w") as answers:
        for name, check in checks(module).items():
            errors = {r: error for r, error in enumerate(world.comm.allgather(outcome(check, rank))) if error}
            if world.rank == 0:
                answers.write(json.dumps([name, errors]) + "\n")
                answers.flush()
    if not shared:
        dist.destroy_process_group()


def joined_on_one_gpu() -> World:
    """What `join` refuses: ranks that share a GPU. NCCL cannot do that; data staged for MPI can."""
    initialise()
    comm = MPI.COMM_WORLD.Dup()
    return World(comm, comm.rank, comm.size, (socket.gethostname(),) * comm.size, torch.device("cuda", 0))


def outcome(check, rank: Rank) -> str:
    try:
        check(rank)
    except Exception:  # noqa: BLE001 - an assertion's error, too, is the check's answer
        return traceback.format_exc()
    return ""


if __name__ == "__main__":
    main(*sys.argv[1:])
