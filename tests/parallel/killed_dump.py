"""``python -m mpi4py -m tests.parallel.killed_dump FOLDER BATCH``: a dump, at whose BATCH-th batch the last rank is killed.

With 0 it is not, and what is in ``FOLDER`` then has to be what one writer writes.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
from pathlib import Path

from nnsight_hpc.parallel import Guard, form_group, join
from tests.parallel.rank import Rank


def main(folder: Path, batch: int) -> None:
    world = join(print)
    guard = Guard(world)
    rank = Rank(world, guard, form_group(world, guard))

    from nnsight_hpc.slurm.worker import dump  # transformers, which is to be imported after the ranks have met
    from nnsight_hpc.slurm.worker.scribe import OwnScribe
    from tests.parallel.dump_checks import dumps_on, frame, go_on, led, written_by_one
    from tests.storage.contents import contents

    dump.SLICE_ROWS = 1024
    put, batches = OwnScribe.put, itertools.count(1)

    def put_or_die(self, values):
        if next(batches) == batch and world.rank == world.size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        put(self, values)

    def lead(model, _):
        go_on(dumps_on(model), 1, frame(), folder)
        assert written_by_one(model) == contents(folder / "set.zarr")

    OwnScribe.put = put_or_die
    led(rank, lead)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
