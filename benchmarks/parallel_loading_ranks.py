"""One rank of `parallel_loading.py`: ``mpirun -np N python -m mpi4py parallel_loading_ranks.py FOLDER FILE``.

Rank 0 writes ``[[dtype, bytes held, anonymous bytes at the peak, seconds], …]`` to FILE, each the most of all ranks.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

from nnsight_hpc.parallel import Guard, World, form_group, join
from nnsight_hpc.parallel.loading import held_bytes, load_parallel

_INTERVAL = 0.001


def anonymous() -> int:
    """Bytes of this process's memory that no file stands behind."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) << 10


class Peak:
    """The most anonymous memory above that at the start, looked at every millisecond by a thread."""

    def __init__(self) -> None:
        self.bytes, self._before = 0, anonymous()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return self.bytes

    def _watch(self) -> None:
        while not self._done.wait(_INTERVAL):
            self.bytes = max(self.bytes, anonymous() - self._before)


def measured(folder: str, world: World, guard: Guard, dtype: str) -> tuple[str, int, int, float]:
    gc.collect()
    peak, begun = Peak(), time.monotonic()
    module = load_parallel(folder, world, guard, dtype=dtype).module
    return dtype, held_bytes(module), peak.stop(), time.monotonic() - begun


def main(folder: str, file: str) -> None:
    torch.set_num_threads(1)
    world = join(print)
    guard = Guard(world)
    form_group(world, guard)
    ranks = [world.comm.gather(measured(folder, world, guard, dtype)) for dtype in ("float32", "bfloat16")]
    if world.rank == 0:
        Path(file).write_text(json.dumps([[*map(max, zip(*of_ranks, strict=True))] for of_ranks in ranks]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
