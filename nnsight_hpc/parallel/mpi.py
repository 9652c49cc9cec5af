"""The MPI library, loaded but not yet initialised; the one place that imports mpi4py.

mpi4py would call MPI_Init when it is imported. `join` does it instead, so that importing this package joins nothing, and
so that a rank that waits for the others in MPI_Init is under a time limit.
"""

from __future__ import annotations

import ctypes

from nnsight_hpc.wire.errors import NotFound, Unreachable

try:
    import mpi4py

    mpi4py.rc.initialize = False
    mpi4py.rc.finalize = True
    from mpi4py import MPI
except (ImportError, RuntimeError) as error:
    raise NotFound(
        "no MPI library can be used from Python",
        why=str(error),
        next="pip install 'nnsight-hpc[worker]', and load the cluster's MPI (module load openmpi), so that libmpi is found",
    ) from None

__all__ = ["MPI", "initialise", "library"]


def initialise() -> int:
    """Enter MPI_Init_thread unless that was done; the level of thread support that the library gives.

    MPI_THREAD_MULTIPLE is asked for: on GPUs autograd calls collectives from a thread of its own, and the watchdog sends
    from another. A lock keeps them apart (see `progress`), so MPI_THREAD_SERIALIZED is enough.

    It is called through ctypes, since mpi4py holds Python's lock meanwhile, and no other thread could see to the time.
    """
    if not MPI.Is_initialized():
        level = ctypes.c_int(0)
        failed = ctypes.CDLL(MPI.__file__).MPI_Init_thread(None, None, int(MPI.THREAD_MULTIPLE), ctypes.byref(level))
        if failed:
            raise Unreachable(
                f"MPI_Init_thread failed with code {failed}", why=library(), next="read the replica's log"
            )
        for comm in (MPI.COMM_WORLD, MPI.COMM_SELF):
            comm.Set_errhandler(MPI.ERRORS_RETURN)  # what mpi4py sets when it initialises MPI itself
    return MPI.Query_thread()


def library() -> str:
    """The name and version of the MPI library."""
    return MPI.Get_library_version().split("\n", 1)[0].strip("\0 ")
