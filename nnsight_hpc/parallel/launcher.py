"""What the launcher says about the world, against what MPI says: without a word to any other rank.

An MPI library that does not match its launcher starts N worlds of one rank each, and every one of them would load the
whole model and serve it. (Seen with Open MPI 5 under ``srun --mpi=none`` and with MPICH under Open MPI's mpirun.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nnsight_hpc.parallel.mpi import library
from nnsight_hpc.wire.errors import Incompatible

if TYPE_CHECKING:
    from collections.abc import Mapping

_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
"""Who started this process comes first: mpirun inside a job step starts other ranks than the step has tasks.

SLURM_NTASKS is not among them: it is set in a batch script and in a shell of salloc, too, where nothing started ranks.
"""
_NEXT = (
    "start the ranks with the launcher of the MPI library that mpi4py uses: srun --mpi=pmix for Open MPI, srun --mpi=pmi2 "
    "for MPICH and Intel MPI (srun --mpi=list shows what there is), or that library's own mpirun"
)


def check_launcher(environment: Mapping[str, str], rank: int, size: int, node: str) -> None:
    """Compare the world with the variables that srun, mpirun, PMI and PMIx set.

    Raises
    ------
    Incompatible
        The launcher started another number of ranks than MPI sees, or gave this process a rank that MPI does not know.
    """
    said = next((name for name in _SIZES if environment.get(name, "").isdigit()), None)
    if said is not None and int(environment[said]) != size:
        what = f"the launcher started {environment[said]} ranks, and MPI sees {size}"
        raise _mismatch(what, f"{said}={environment[said]}", rank, node)
    number = environment.get("PMIX_RANK", "")
    if number.isdigit() and int(number) >= size:
        what = f"the launcher calls this process rank {number}, and MPI sees {size} rank{'s' * (size > 1)}"
        raise _mismatch(what, f"PMIX_RANK={number}", rank, node)


def _mismatch(what: str, variable: str, rank: int, node: str) -> Incompatible:
    return Incompatible(
        what,
        where=f"rank {rank} on {node}",
        why=f"{variable}; mpi4py uses {library()}, which does not belong to this launcher",
        next=_NEXT,
    )
