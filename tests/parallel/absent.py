"""``python -m mpi4py -m tests.parallel.absent HOW FOLDER``: rank 1 does not join as the others do; they say what they hear."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from nnsight_hpc.parallel import join
from nnsight_hpc.parallel.mpi import initialise
from nnsight_hpc.wire.errors import HpcError


def main(how: str, folder: Path) -> None:
    rank = os.environ["OMPI_COMM_WORLD_RANK"]
    if rank == "1":
        if how == "after MPI_Init":
            initialise()
        time.sleep(20)
        os._exit(1)
    try:
        join(lambda error: (folder / f"heard-{rank}").write_text(str(error)), timeout=3.0)
    except HpcError as error:
        (folder / f"heard-{rank}").write_text(str(error))
        time.sleep(3)  # the others shall hear it, too, before this one's end ends them
        os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
