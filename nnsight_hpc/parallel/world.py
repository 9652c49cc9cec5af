"""Joining the MPI world: who is where, checked before any weights are read.

A replica is one job of N ranks. What can be wrong is found here, on all ranks and in under a minute, since a wrong start
costs minutes of loading or, worse, gives wrong numbers: a launcher that does not fit the MPI library (`launcher`), a rank
that never comes (`rollcall`), an MPI that cannot reduce, different software, different models, GPUs that do not suffice.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from nnsight_hpc.parallel.checks import check_equal, check_reduction, software
from nnsight_hpc.parallel.devices import own_device
from nnsight_hpc.parallel.ending import ending_after
from nnsight_hpc.parallel.launcher import check_launcher
from nnsight_hpc.parallel.mpi import MPI, initialise
from nnsight_hpc.parallel.rollcall import roll_call
from nnsight_hpc.wire.errors import Incompatible, Unreachable

if TYPE_CHECKING:
    from collections.abc import Callable

    from nnsight_hpc.wire.errors import HpcError

_TIMEOUT = 45.0
"""Seconds that the ranks may come apart; with the checks that follow, a wrong start is told in under a minute."""


@dataclass(frozen=True, eq=False)
class World:
    """The ranks of a replica, as one of them sees them.

    Attributes
    ----------
    comm
        The communicator of all ranks; ours alone (a duplicate of MPI_COMM_WORLD).
    rank, size
        This rank, from 0, and the number of ranks.
    nodes
        The name of each rank's node.
    device
        Where this rank computes: a GPU of its own, or the CPU.
    """

    comm: MPI.Intracomm
    rank: int
    size: int
    nodes: tuple[str, ...]
    device: torch.device

    @property
    def node(self) -> str:
        """The name of this rank's node."""
        return self.nodes[self.rank]

    @property
    def local_rank(self) -> int:
        """The place of this rank among the ranks of its node, from 0."""
        return self.ranks_on(self.node).index(self.rank)

    def ranks_on(self, node: str) -> tuple[int, ...]:
        """The ranks of a node, in order."""
        return tuple(rank for rank, name in enumerate(self.nodes) if name == node)

    def name(self, rank: int) -> str:
        """What to call a rank in an error: its number and its node."""
        return f"rank {rank} on {self.nodes[rank]}"

    def roll_call(self, answer: object, occasion: str, timeout: float = 30.0) -> list[Any]:
        """The answers of all ranks; see `rollcall.roll_call`."""
        return roll_call(self.comm, answer, [*map(self.name, range(self.size))], timeout, occasion)


def join(last_words: Callable[[HpcError], None], timeout: float = _TIMEOUT) -> World:
    """Join the world that srun or mpirun started, and check it; sets RANK, WORLD_SIZE and LOCAL_RANK as torchrun does.

    transformers computes on GPU number LOCAL_RANK, so this is the device's number where there are GPUs.

    Parameters
    ----------
    last_words
        Takes the error when the others do not come to MPI_Init, which can only be left with the process.
    timeout
        Seconds to wait for the other ranks.

    Raises
    ------
    Incompatible
        The launcher does not fit the MPI library, or the ranks run different versions of the software.
    Unreachable
        A rank did not come, or the ranks cannot reduce.
    InvalidInput
        A node has fewer GPUs than ranks.
    """
    node = socket.gethostname()
    late = Unreachable(
        f"the ranks did not meet within {timeout:g} s",
        where=f"MPI_Init, on {node}",
        why="a rank of the job was never started, or cannot reach the others",
        next="look in the replica's log for a rank that failed before this one; srun --mpi=list shows what srun can start",
    )
    end = time.monotonic() + timeout
    with ending_after(timeout, late, last_words):
        level = initialise()
    comm = MPI.COMM_WORLD
    check_launcher(os.environ, comm.rank, comm.size, node)
    if level < MPI.THREAD_SERIALIZED:
        raise Incompatible("the MPI library cannot be used by more than one thread", where=node)
    names = [f"rank {rank}" for rank in range(comm.size)]
    nodes = roll_call(comm, node, names, end - time.monotonic(), "joining the world")
    world = World(comm.Dup(), comm.rank, comm.size, tuple(nodes), torch.device("cpu"))
    check_reduction(world, timeout=10.0)
    check_equal(world, software(), "the ranks run different software")
    world = replace(world, device=own_device(world))
    local = world.local_rank if world.device.index is None else world.device.index
    os.environ |= {"RANK": str(world.rank), "WORLD_SIZE": str(world.size), "LOCAL_RANK": str(local)}
    return world
