"""Joining the world: what each rank knows of the others, and how facts are compared."""

from __future__ import annotations

import socket
import time

import torch

from nnsight_hpc.parallel import check_equal
from nnsight_hpc.parallel.checks import software
from nnsight_hpc.parallel.mpi import MPI
from nnsight_hpc.wire.errors import Incompatible


def check_the_world(rank):
    """Each rank knows its number, its node, and who else is there."""
    world, size = rank.world, MPI.COMM_WORLD.size
    assert (MPI.COMM_WORLD.rank, size) == (world.rank, world.size)
    assert (socket.gethostname(),) * size == world.nodes
    assert tuple(range(size)) == world.ranks_on(world.node)
    assert world.rank == world.local_rank
    assert f"rank 1 on {socket.gethostname()}" == world.name(1)
    assert torch.device("cpu") == world.device
    assert MPI.Query_thread() == MPI.THREAD_MULTIPLE


def check_everyone_hears_everyone(rank):
    """A roll call gives all ranks all answers, in order."""
    answers = rank.world.roll_call({"square": rank.world.rank**2}, "counting")
    assert [{"square": one**2} for one in range(rank.world.size)] == answers


def check_equal_facts_pass(rank):
    """The same software and model on all ranks is no error."""
    check_equal(rank.world, {**software(), "model": "3fa0"}, "different")


def check_different_facts_are_told_on_all_ranks(rank):
    """A model that differs on one rank is an error on all, which names rank, node and both values."""
    mine = "new" if rank.world.rank == 1 else "old"
    try:
        check_equal(rank.world, {"model": mine, "dtype": "bfloat16"}, "the ranks have different models")
    except Incompatible as error:
        text = str(error)
    node = rank.world.node
    assert f"model is old on rank 0 on {node}, new on rank 1 on {node}" in text
    assert text.startswith("the ranks have different models\n")
    assert "dtype" not in text.split("next:", maxsplit=1)[0]
    assert {text} == set(rank.world.comm.allgather(text))


def check_a_slow_rank_is_waited_for(rank):
    """A rank that comes late, but in time, is no error."""
    if rank.world.rank == rank.world.size - 1:
        time.sleep(0.5)
    assert [*range(rank.world.size)] == rank.world.roll_call(rank.world.rank, "waiting", timeout=20)
