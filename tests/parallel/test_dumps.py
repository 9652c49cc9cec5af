"""Dumps of several ranks on real MPI ranks; each case is one check, run on all of them."""

import pytest

from nnsight_hpc.storage import DatasetWriter, read_attributes
from tests.parallel.ranks import answers, checks, mostly, mpirun


@pytest.mark.parametrize("name", [*checks("dump_checks"), "the end"])
@pytest.mark.parametrize("ranks", mostly(2))
def test_dumps(ranks, name):
    """What `dump_checks` says of dumps holds on every rank."""
    assert answers("dump_checks", ranks)[name] == ""


@pytest.mark.slow
def test_a_rank_that_is_killed_in_the_middle_of_a_slice(tmp_path):
    """The next ranks go on where the slices are that are whole, and the files are those of one writer."""
    path, batch = tmp_path / "set.zarr", 8

    def dump(kill_at: int) -> int:
        program = ["-m", "tests.parallel.killed_dump", str(tmp_path), str(kill_at)]
        return mpirun(2, program, scratch=tmp_path, timeout=250).wait()

    assert dump(batch) != 0
    assert not read_attributes(path).complete
    assert 0 < len(DatasetWriter(path).pending()) < read_attributes(path).slices, (tmp_path / "output").read_text()
    assert [*path.rglob("*.partial")]
    assert dump(0) == 0, (tmp_path / "output").read_text()
