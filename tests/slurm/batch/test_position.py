"""Where a job stands in the queue, from recorded answers of squeue (a real queue: `test_slurm`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from nnsight_hpc.slurm.batch.position import position

if TYPE_CHECKING:
    from .conftest import Recorded

QUEUE = """\
20|100|Priority|gpu
12|100|Resources|gpu
15|300|Resources|cpu
11|900|BeginTime|gpu
10|900|JobHeldUser|gpu
14_[1-9]|200|Resources|gpu
16|50|Priority|cpu,gpu
17|10|Priority|cpu
9|800|AssocGrpCpuLimit|gpu
???
"""


@pytest.mark.parametrize(
    ("job", "place"),
    [
        ("14", None),
        ("12", 2),
        ("20", 3),
        ("15", 1),
        ("16", 5),
        ("17", 3),
        ("11", None),
        ("10", None),
        ("9", None),
        ("1", None),
    ],
)
def test_a_jobs_place_is_among_those_that_wait_for_their_turn(recorded: Recorded, job: str, place: int | None) -> None:
    """The highest priority of a shared partition is the first, then the oldest; what waits for other things has none."""
    recorded.program("squeue", QUEUE.replace("|", "\x1f"))
    assert place == position(job)
    assert len(recorded.runs("squeue")) == 1


def test_jobs_that_slurm_does_not_show_make_it_unknown(recorded: Recorded) -> None:
    """With PrivateData one sees one's own jobs only: the first of them waits behind others all the same."""
    recorded.program("squeue", "12|100|Priority|gpu\n13|90|Priority|gpu\n".replace("|", "\x1f"))
    assert position("12") is None
    assert position("13") is None


@pytest.mark.parametrize(
    "answer", [{"err": "Unable to contact slurm controller\n", "code": 1}, {}, {"out": "\x1f\x1f\n"}]
)
def test_without_an_answer_there_is_no_place(recorded: Recorded, answer: dict[str, object]) -> None:
    """Nothing is made up."""
    recorded.program("squeue", **answer)
    assert position("12") is None
