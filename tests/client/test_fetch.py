"""Fetching real datasets over HTTP, with what goes wrong on the way."""

from __future__ import annotations

import os

import pytest

from nnsight_hpc.client.fetch import fetch
from nnsight_hpc.client.session import connect
from nnsight_hpc.storage import ActivationDataset, convert_dataset
from nnsight_hpc.wire.errors import Conflict, CorruptData, InvalidInput, NotFound
from nnsight_hpc.wire.messages import DatasetFile


@pytest.fixture
def client(server, dataset):
    server.datasets["acts"] = dataset
    client = connect("local")
    yield client
    client.close()


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def shard_of(dataset):
    """The path of one large file."""
    return str(max((p for p in dataset.rglob("*") if p.is_file()), key=os.path.getsize).relative_to(dataset))


def test_a_copy_is_byte_for_byte_the_dataset(client, dataset, base):
    """All files arrive, the reader opens the copy, and nothing else is left."""
    path = fetch(client, "acts", base)
    assert path == base / "acts.zarr"
    assert content(path) == content(dataset)
    assert (
        ActivationDataset(path)["model.layers.2.output"][:] == ActivationDataset(dataset)["model.layers.2.output"][:]
    ).all()
    assert not (base / "acts.zarr.partial").exists()


def test_a_copy_of_hdf5_is_that_too(client, server, dataset, base):
    """Its folder has the ending of its format."""
    server.datasets["acts"] = dataset.with_suffix(".hdf5")
    convert_dataset(dataset, server.datasets["acts"], lambda done, total: None)
    path = fetch(client, "acts", base)
    assert path == base / "acts.hdf5"
    assert content(path) == content(server.datasets["acts"])


def test_the_roots_metadata_comes_last(client, server, dataset, base):
    """Until the end, no reader takes the copy for a dataset."""
    fetch(client, "acts", base)
    assert server.served[-1][0] == "zarr.json"


def test_a_lost_connection_is_gone_on_from_where_it_stopped(client, server, dataset, base):
    """The second request asks for the rest only."""
    server.truncate_at = 5000
    path = fetch(client, "acts", base)
    assert content(path) == content(dataset)
    assert "bytes=5000-" in [asked for _, asked in server.served]


def test_an_interrupted_fetch_is_gone_on_with_by_the_next(client, server, dataset, base):
    """What an earlier process brought is not brought again, also the half of a file."""
    name = shard_of(dataset)
    done = [path for path in content(dataset) if path not in (name, "zarr.json")]
    partial = base / "acts.zarr.partial"
    for path in done:
        (partial / path).parent.mkdir(parents=True, exist_ok=True)
        (partial / path).write_bytes((dataset / path).read_bytes())
    (partial / f"{name}.partial").write_bytes((dataset / name).read_bytes()[:1000])
    path = fetch(client, "acts", base)
    assert content(path) == content(dataset)
    assert server.served == [(name, "bytes=1000-"), ("zarr.json", "")]


@pytest.mark.parametrize("suffix", ["", ".partial"])
def test_damage_in_what_an_earlier_run_left_is_mended(client, dataset, base, suffix):
    """A flipped byte in a finished or a half file leads to its being brought again."""
    name = shard_of(dataset)
    target = base / "acts.zarr.partial" / f"{name}{suffix}"
    target.parent.mkdir(parents=True)
    data = bytearray((dataset / name).read_bytes()[: None if not suffix else 1000])
    data[500] ^= 1
    target.write_bytes(data)
    assert content(fetch(client, "acts", base)) == content(dataset)


def test_a_byte_flipped_on_the_way_is_detected(client, server, dataset, base):
    """The copy gets no name, and the file that is wrong is named."""
    name = shard_of(dataset)
    data = bytearray((dataset / name).read_bytes())
    data[-1] ^= 1
    server.replace[name] = bytes(data)
    with pytest.raises(CorruptData) as caught:
        fetch(client, "acts", base)
    assert name in caught.value.what
    assert not (base / "acts.zarr").exists()
    assert not (base / "acts.zarr.partial" / name).exists()


def test_a_byte_flipped_on_the_cluster_is_detected(client, server, dataset, base):
    """A shard that no longer matches the manifest is not passed on as good, although it arrives as it is."""
    name = shard_of(dataset)
    with (dataset / name).open("r+b") as file:
        file.write(b"\x55")
    with pytest.raises(CorruptData) as caught:
        fetch(client, "acts", base)
    assert name in str(caught.value)
    assert not (base / "acts.zarr").exists()


def test_a_copy_that_exists_is_a_conflict(client, base):
    """Nothing is overwritten, nothing is asked for."""
    fetch(client, "acts", base)
    with pytest.raises(Conflict, match="exists"):
        fetch(client, "acts", base)


def test_an_unknown_dataset_is_not_found(client, base):
    """No folder is made for it."""
    with pytest.raises(NotFound):
        fetch(client, "other", base)
    assert not (base / "other.zarr.partial").exists()


def test_a_listed_path_that_leads_out_is_refused(client, server, base, monkeypatch):
    """A dishonest daemon writes nothing beside the copy."""
    evil = [DatasetFile(path="../evil", size=1, crc32c=0)]
    get = client.get
    monkeypatch.setattr(
        client, "get", lambda path, as_type, **kw: evil if path.endswith("/files") else get(path, as_type)
    )
    with pytest.raises(InvalidInput, match="outside"):
        fetch(client, "acts", base)
    assert not (base / "evil").exists()
