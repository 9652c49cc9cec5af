"""Which GPU a rank computes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nnsight_hpc.wire.errors import InvalidInput

if TYPE_CHECKING:
    from nnsight_hpc.parallel.world import World


def own_device(world: World) -> torch.device:
    """A GPU that no other rank has, or the CPU where no rank has one.

    With one visible GPU a rank (``--gpus-per-task``) its number is 0 on all of them, so GPUs are compared by their UUID.
    """
    count = torch.cuda.device_count()
    device = torch.device("cuda", world.local_rank % count) if count else torch.device("cpu")
    identity = str(torch.cuda.get_device_properties(device).uuid) if count else ""
    gpus = world.roll_call((identity, count), "counting GPUs")
    for node in dict.fromkeys(world.nodes):
        check_gpus(node, {rank: gpus[rank] for rank in world.ranks_on(node)}, any(count for _, count in gpus))
    if count:
        torch.cuda.set_device(device)
    return device


def check_gpus(node: str, gpus: dict[int, tuple[str, int]], needed: bool) -> None:
    distinct = {identity for identity, count in gpus.values() if count}
    if needed and len(distinct) < len(gpus):
        each = ", ".join(f"rank {rank} sees {count}" for rank, (_, count) in gpus.items())
        raise InvalidInput(
            f"{node} has {len(gpus)} ranks and {len(distinct)} GPUs for them",
            where=f"node {node}: {each}",
            why="each rank needs a GPU of its own",
            next="ask Slurm for a GPU for each rank of a node: gpus_per_node of the pool is tp / nodes, rounded up",
        )
