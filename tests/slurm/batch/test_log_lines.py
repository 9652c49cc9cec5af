"""The lines of one rank out of the log of several."""

from __future__ import annotations

import pytest

from nnsight_hpc.slurm.batch.log_lines import of_rank

SRUN = "loading modules\n0: one\n1: uno\n 0: two\n01: dos\n10: zehn\nsrun: error: n1: task 1: Killed\n1: no end"
OPEN_MPI_4 = "start\n[1,0]<stdout>:one\n[1,1]<stderr>:uno\n[1,0]<stderr>:two\n[1,1]<stdout>:dos\n[1,10]<stdout>:x\n"
OPEN_MPI_5 = OPEN_MPI_4.replace(">:", ">: ")


@pytest.mark.parametrize(
    ("text", "rank", "lines"),
    [
        (SRUN, 0, "one\ntwo\n"),
        (SRUN, 1, "uno\ndos\nno end"),
        (SRUN, 10, "zehn\n"),
        (SRUN, 2, ""),
        (OPEN_MPI_4, 0, "one\ntwo\n"),
        (OPEN_MPI_5, 1, "uno\ndos\n"),
        ("0: 1: a clock 12: 30\n0: \n", 0, "1: a clock 12: 30\n\n"),
        ("", 0, ""),
    ],
)
def test_lines_of_a_rank_without_their_label(text: str, rank: int, lines: str) -> None:
    """As srun --label and Open MPI's mpirun write them; what neither rank has written is left out."""
    assert lines == of_rank(text, rank)
