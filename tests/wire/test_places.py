"""Where things are, as the environment says."""

from pathlib import Path

import pytest

from nnsight_hpc.wire.errors import InvalidInput
from nnsight_hpc.wire.places import places


def test_variables_move_home_and_datasets(monkeypatch):
    """Each executor has a home of its own below $NNSIGHT_HPC_HOME; datasets lie on scratch where one is named."""
    monkeypatch.setenv("NNSIGHT_HPC_HOME", "/shared/a b")
    monkeypatch.setenv("NNSIGHT_HPC_SCRATCH", "")
    assert places("slurm").datasets == Path("/shared/a b/slurm/datasets")
    monkeypatch.setenv("NNSIGHT_HPC_SCRATCH", "~/scratch")
    assert places("embedded").home == Path("/shared/a b/embedded")
    assert places("embedded").datasets == Path("~/scratch/datasets").expanduser()


@pytest.mark.parametrize("variable", ["NNSIGHT_HPC_HOME", "NNSIGHT_HPC_SCRATCH"])
def test_a_relative_folder_is_refused(monkeypatch, variable):
    """It would be another folder for each program: the daemon's working directory is not its caller's."""
    monkeypatch.setenv(variable, "scratch")
    with pytest.raises(InvalidInput, match=variable):
        places("embedded")
