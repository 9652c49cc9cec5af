"""All-reduces between two MPI ranks of this machine: through our process group, by mpi4py alone, and by gloo; the guard's word.

For bfloat16, which MPI cannot add, "mpi4py alone" reduces as many float32 numbers. Best of many, each way in turn, in the
same ranks. Below 256 KiB the calls through Python (10 to 20 us) weigh more than the bytes: those ratios have no goal.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from figures import Figure, main

if TYPE_CHECKING:
    from collections.abc import Iterator

RANKS = 2
_COMMAND = ["mpirun", "--oversubscribe", "--allow-run-as-root", "--bind-to", "none", "-np", str(RANKS), sys.executable]
_LARGE = 256 << 10


def measure(quick: bool) -> Iterator[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        program = [
            "-m",
            "mpi4py",
            str(Path(__file__).with_name("tensor_parallel_ranks.py")),
            str(answer),
            str(int(quick)),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        subprocess.run([*_COMMAND, *program], check=True, env=environment)
        measured = json.loads(answer.read_text())
    for dtype, size, raw, ours, gloo in measured["all_reduce"]:
        name = f"{dtype}, {size >> 10} KiB"
        yield Figure(f"{name}: ours / mpi4py", ours / raw, 1.5 if size >= _LARGE else None, "<=", f"{raw:.0f} us")
        yield Figure(f"{name}: gloo / ours", gloo / ours, 1.0, ">=", f"{gloo:.0f} us")
    yield Figure("a word of the guard, us", measured["word"], None, "<=", "")
    yield Figure("a word / mpi4py", measured["word"] / measured["integers"], 4, "<=", "an all-reduce of three integers")


if __name__ == "__main__":
    main(measure, __doc__)
