"""What must be alike on all ranks before a model is loaded, and that they can reduce at all."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np

from nnsight_hpc.parallel.mpi import MPI, library
from nnsight_hpc.parallel.rollcall import within
from nnsight_hpc.wire.errors import Incompatible, Unreachable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nnsight_hpc.parallel.world import World


def software() -> dict[str, str]:
    """The versions on which ranks must agree."""
    packages = {name: version(name) for name in ("nnsight-hpc", "torch", "transformers", "mpi4py")}
    return {"Python": platform.python_version(), **packages, "MPI": library()}


def check_equal(world: World, facts: Mapping[str, str], what: str) -> None:
    """Compare facts over all ranks: versions, a model's fingerprint, its dtype.

    Parameters
    ----------
    facts
        The same keys on every rank.
    what
        How to say that they differ.

    Raises
    ------
    Incompatible
        Some ranks differ from rank 0; on all ranks, with each difference.
    """
    answers = world.roll_call(dict(facts), f"comparing {', '.join(facts)}")
    first: dict[str, str] = answers[0]
    differences = [
        f"{key} is {first.get(key)} on {world.name(0)}, {answer.get(key)} on {world.name(rank)}"
        for rank, answer in enumerate(answers)
        for key in sorted(first.keys() | answer.keys())
        if answer.get(key) != first.get(key)
    ]
    if differences:
        raise Incompatible(
            what,
            where=f"{world.size} ranks on {', '.join(dict.fromkeys(world.nodes))}",
            why="\n".join(differences),
            next="let all nodes use one environment and one copy of the model, on a file system that all of them see",
        )


def check_reduction(world: World, timeout: float) -> None:
    """Reduce once, with a time limit: small messages may pass where collectives hang (wrong network interfaces)."""
    total = np.zeros(1, dtype=np.int64)
    request = world.comm.Iallreduce(np.array([world.rank + 1], dtype=np.int64), total, op=MPI.SUM)
    expected = world.size * (world.size + 1) // 2
    if not within(timeout, request.Test) or total[0] != expected:
        raise Unreachable(
            "the ranks reach one another, but a first all-reduce "
            + (f"gave {total[0]}" if total[0] else "did not end"),
            where=world.name(world.rank),
            why=f"it should have given {expected} within {timeout:g} s",
            next="tell MPI which network to use (Open MPI: OMPI_MCA_btl_tcp_if_include, UCX_NET_DEVICES)",
        )
