"""``python -m mpi4py -m tests.parallel.absent HOW SECONDS FOLDER``: rank 1 does not join as the others do, who wait so long.

What they hear they write to ``FOLDER/heard-RANK``.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from nnsight_hpc.parallel import join
from nnsight_hpc.parallel.mpi import initialise
from nnsight_hpc.wire.errors import HpcError


def main(how: str, seconds: float, folder: Path) -> None:
    rank, size = (int(os.environ[f"OMPI_COMM_WORLD_{name}"]) for name in ("RANK", "SIZE"))
    meet(folder, "started", rank, size)  # on a busy machine they start seconds apart
    if rank == 1:
        if how == "after MPI_Init":
            initialise()
        while True:
            signal.pause()
    try:
        join(lambda error: (folder / f"heard-{rank}").write_text(str(error)), timeout=seconds)
    except HpcError as error:
        (folder / f"heard-{rank}").write_text(str(error))
        meet(folder, "told", rank, size - 1)  # the first that ends is the end of all
        os._exit(1)


def meet(folder: Path, where: str, rank: int, ranks: int) -> None:
    """Wait until so many ranks are here."""
    (folder / f"{where}-{rank}").touch()
    while len([*folder.glob(f"{where}-*")]) < ranks:
        time.sleep(0.01)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), Path(sys.argv[3]))
