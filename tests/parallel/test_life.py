"""Ranks that are killed, hang, compute for long, or lose their leader: the job ends in seconds, or does not."""

from __future__ import annotations

import pytest

from nnsight_hpc.parallel.ending import EXIT_CODE
from tests.parallel.life import LIMIT
from tests.parallel.ranks import mpirun


def live(what, tmp_path, ranks=2):
    """The exit code of a job in which something happens, and what its ranks left."""
    code = mpirun(ranks, ["-m", "tests.parallel.life", what, str(tmp_path)], scratch=tmp_path).wait()
    left = {path.name: path.read_text() for path in tmp_path.glob("*-*") if path.is_file()}
    return code, left


def test_what_is_legal_is_left_alone(tmp_path):
    """A rank that computes for longer than the limit without a word, or rests for less, is not hanging."""
    code, left = live("computes,rests", tmp_path)
    assert code == 0, (tmp_path / "output").read_text()[-3000:]
    assert left == {"did-0": "[2.0, 2.0, 2.0]", "did-1": "followed to the end"}


@pytest.mark.parametrize(("what", "ranks"), [("blocked", 2), ("stopped", 3)])
def test_a_hanging_rank_ends_the_job(what, ranks, tmp_path):
    """A rank that is blocked or stopped in a request ends the job once the limit is over; rank 0 says which it was."""
    code, left = live(what, tmp_path, ranks)
    assert code == EXIT_CODE
    assert left["last-0"].startswith(f"rank {ranks - 1} on ")
    assert "gave no sign of life" in left["last-0"]
    assert not [name for name in left if name.startswith("did-")]


def test_a_leader_that_hangs_says_so_itself(tmp_path):
    """Of a blocked main thread the watchdog's thread of the same process knows."""
    code, left = live("leader blocked", tmp_path)
    assert code == EXIT_CODE
    assert f"did nothing for {LIMIT:g} s while a request ran" in left["last-0"]
    assert "its main thread is blocked" in left["last-0"]


def test_ranks_that_wait_for_one_another_end_the_job(tmp_path):
    """Ranks that wait in different groups, each for another, are found out: nobody computes."""
    code, left = live("at odds", tmp_path, ranks=3)
    assert code == EXIT_CODE
    assert left["last-0"].startswith(f"all ranks waited for one another for {LIMIT:g} s while a request ran")


@pytest.mark.parametrize("what", ["killed", "leader raises", "leader vanishes"])
def test_a_rank_that_dies_ends_the_job(what, tmp_path):
    """When a rank dies, the launcher ends the others, followers too."""
    code, left = live(what, tmp_path)
    assert code not in {0, 124}, (tmp_path / "output").read_text()[-3000:]
    assert "did-0" not in left
