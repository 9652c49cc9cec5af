"""``nnsight-hpc convert``."""

import pytest

from nnsight_hpc.storage import ActivationDataset
from tests.client.program import answer, call


@pytest.mark.parametrize("given", ["acts", "acts.zarr"])
def test_convert_copies_a_dataset_of_this_machine_into_the_other_format(base, dataset, monkeypatch, given):
    """By name or folder; the copy lies beside it, and is not made twice."""
    monkeypatch.chdir(dataset.parent)
    assert answer("convert", given, "--to", "hdf5") == {"path": "acts.hdf5"}
    copy, name = ActivationDataset(dataset.with_suffix(".hdf5")), "model.layers.1.output"
    assert copy[name][:].tobytes() == ActivationDataset(dataset)[name][:].tobytes()
    assert "the dataset is complete" in call("convert", given, "--to", "hdf5", code=5)[1]


def test_convert_refuses_what_it_cannot_convert(base, dataset):
    """A dataset that is not there, and one that has the format already."""
    assert "there is no dataset" in call("convert", str(dataset.parent / "none"), "--to", "hdf5", code=4)[1]
    assert "--to hdf5" in call("convert", str(dataset), "--to", "zarr", code=2)[1]
