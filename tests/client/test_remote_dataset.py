"""A dataset on a cluster that is read without a copy."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from nnsight_hpc.storage import ActivationDataset
from nnsight_hpc.wire.errors import Conflict, CorruptData, InvalidInput, NotFound

TWO = "model.layers.2.output"


@pytest.fixture
def remote(server, dataset):
    server.datasets["acts"] = dataset
    with ActivationDataset("local:acts") as remote:
        yield remote


def test_it_reads_as_a_local_one(remote, dataset):
    """Rows by range, by number and by mask, documents by id, what it is made of."""
    here = ActivationDataset(dataset)
    assert (len(remote), remote.captures, remote.provenance) == (len(here), here.captures, here.provenance)
    for rows in (slice(500, 1100), [7, 3, 1999], np.arange(2000) % 100 == 0, -1):
        assert np.array_equal(remote[TWO][rows], here[TWO][rows])
    assert np.array_equal(remote.document("b")[TWO], here.document("b")[TWO])
    assert str(remote.path) == "local:acts"


def test_only_what_is_read_travels(remote, server):
    """A range of rows is a range of bytes; small reads that lie close together are one."""
    server.served.clear()
    remote[TWO][0:2]
    remote[TWO][3:5]
    assert [path for path, _ in server.served] == [f"activations/{TWO}/c.0.0"]
    assert server.served[0][1].startswith("bytes=0-")


def test_training_reads_it_in_worker_processes(remote, dataset):
    """Each process has a connection of its own: all rows come, as they are."""
    batches = remote.to_torch([TWO], batch_size=256, shuffle=False)
    loaded = torch.cat([batch[TWO] for batch in DataLoader(batches, batch_size=None, num_workers=2)])
    assert sorted(loaded[:, 0].tolist()) == sorted(ActivationDataset(dataset)[TWO][:, 0].tolist())


def test_an_array_is_sent_to_another_process(remote, dataset):
    """As dask's and torch's spawned workers do it."""
    array = pickle.loads(pickle.dumps(remote[TWO]))
    assert np.array_equal(array[5:9], ActivationDataset(dataset)[TWO][5:9])


def test_a_lost_connection_is_made_anew(remote, server, dataset):
    """Between two reads, and in the midst of one."""
    server.hang_up()
    assert np.array_equal(remote[TWO][:3], ActivationDataset(dataset)[TWO][:3])
    server.truncate_at = 5000
    assert np.array_equal(remote[TWO][600:1900], ActivationDataset(dataset)[TWO][600:1900])


def test_what_is_closed_is_read_no_more(remote):
    """It would open a connection that nobody closes."""
    remote.close()
    with pytest.raises(Conflict, match="closed"):
        remote[TWO][1500]


def test_a_shard_that_became_shorter_is_damage(remote, server, dataset):
    """It is said, and no row is made up."""
    server.replace[f"activations/{TWO}/c.0.0"] = b"short"
    with pytest.raises(CorruptData):
        remote[TWO][0:10]


def test_it_is_verified_where_it_lies(remote):
    """A copy, or the dataset on the cluster."""
    with pytest.raises(InvalidInput, match="where it lies"):
        remote.verify()


def test_wrong_names_are_told(server):
    """The cluster's, with those that there are; the dataset's."""
    with pytest.raises(NotFound, match="no cluster 'unii'"):
        ActivationDataset("unii:acts")
    with pytest.raises(NotFound, match="no dataset 'nope'"):
        ActivationDataset("local:nope")


def test_a_folder_with_a_colon_is_a_folder(dataset, tmp_path, monkeypatch):
    """What is on the disk is meant."""
    dataset.rename(tmp_path / "local:acts.zarr")
    monkeypatch.chdir(tmp_path)
    assert len(ActivationDataset("local:acts.zarr")) == 2000
