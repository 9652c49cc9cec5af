"""``python -m nnsight_hpc.slurm.batch.mpi``: prints which ``--mpi`` srun needs, for ``mpi = "auto"`` of a pool.

It is what the MPI library speaks that mpi4py loads, out of what this Slurm offers. It runs in the job, after the pool's setup,
since a login node may load another library, or none; a pair that does not fit gives an abort, or N worlds of one rank.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from nnsight_hpc.slurm.batch.command import run
from nnsight_hpc.wire.errors import HpcError, Incompatible, NotFound

if TYPE_CHECKING:
    from collections.abc import Sequence

_SPEAKS = (
    ("open mpi", ("pmix",)),
    ("cray", ("cray_shasta", "pmi2")),
    ("intel", ("pmi2", "pmix")),
    ("mvapich", ("pmi2", "pmix")),
    ("mpich", ("pmi2", "pmix")),
)
"""A word in the library's name for itself, and the plugins of Slurm's that it can be started with, the best first."""


def choose(library: str, offered: Sequence[str]) -> str:
    """The plugin for an MPI library (``MPI_Get_library_version``), of those that ``srun --mpi=list`` names.

    Raises `Incompatible` when there is none. Of several versions of PMIx the newest is taken, unless one is plain ``pmix``.
    """
    wanted = next((plugins for word, plugins in _SPEAKS if word in library.lower()), ("pmix", "pmi2"))
    for plugin in wanted:
        versions = sorted(one for one in offered if one.startswith(f"{plugin}_v"))
        if plugin in offered or versions:
            return plugin if plugin in offered else versions[-1]
    raise Incompatible(
        "srun cannot start the ranks of this MPI library",
        why=f"it offers {', '.join(offered) or 'nothing'}; mpi4py uses {library}, which needs {' or '.join(wanted)}",
        next="load another MPI library in the pool's setup, or name one of srun --mpi=list with --mpi",
    )


def offered() -> list[str]:
    """What ``srun --mpi=list`` names; versions of Slurm differ in where and how they print it."""
    answer = run("srun", "--mpi=list")
    words = (answer.out + answer.err).replace(",", " ").split()
    return [word for word in words if word == "cray_shasta" or word.startswith("pm")]


def library() -> str:
    """What the MPI library that mpi4py loads calls itself; MPI is not initialised."""
    try:
        import mpi4py  # noqa: PLC0415 - the daemon, which imports this package, needs no MPI

        mpi4py.rc.initialize = False
        from mpi4py import MPI  # noqa: PLC0415
    except (ImportError, RuntimeError) as error:
        raise NotFound(
            "no MPI library can be used from Python",
            why=str(error),
            next="pip install 'nnsight-hpc[worker]', and load the cluster's MPI in the pool's setup (module load openmpi)",
        ) from None
    return str(MPI.Get_library_version()).split("\n", 1)[0].split(",", 1)[0].strip("\0 ")


def main() -> int:
    try:
        print(choose(library(), offered()))
    except HpcError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
