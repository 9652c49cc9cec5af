"""Fetching real datasets over HTTP, with what goes wrong on the way."""

from __future__ import annotations

import os
import resource

import pytest

from nnsight_hpc.client.fetch import fetch
from nnsight_hpc.client.patience import PatientClient
from nnsight_hpc.storage import ActivationDataset, convert_dataset
from nnsight_hpc.wire.errors import Conflict, CorruptData, Denied, HpcError, InvalidInput, NotFound
from nnsight_hpc.wire.messages import DatasetFile, RequestStatus
from nnsight_hpc.wire.states import RequestState


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def shard_of(dataset):
    """The path of one large file."""
    return str(max((p for p in dataset.rglob("*") if p.is_file()), key=os.path.getsize).relative_to(dataset))


def test_a_copy_is_byte_for_byte_the_dataset(clients, dataset, base):
    """All files arrive, the reader opens the copy, and nothing else is left."""
    path = fetch(clients, "acts", base)
    assert path == base / "acts.zarr"
    assert content(path) == content(dataset)
    assert (
        ActivationDataset(path)["model.layers.2.output"][:] == ActivationDataset(dataset)["model.layers.2.output"][:]
    ).all()
    assert not (base / "acts.zarr.partial").exists()


def test_a_copy_of_hdf5_is_that_too(clients, server, dataset, base):
    """Its folder has the ending of its format."""
    server.datasets["acts"] = dataset.with_suffix(".hdf5")
    convert_dataset(dataset, server.datasets["acts"], lambda done, total: None)
    path = fetch(clients, "acts", base)
    assert path == base / "acts.hdf5"
    assert content(path) == content(server.datasets["acts"])


def test_the_roots_metadata_comes_last(clients, server, dataset, base):
    """Until the end, no reader takes the copy for a dataset."""
    fetch(clients, "acts", base)
    assert server.served[-1][0] == "zarr.json"


def test_a_lost_connection_is_gone_on_from_where_it_stopped(clients, server, dataset, base):
    """The second request asks for the rest only."""
    server.truncate_at = 5000
    path = fetch(clients, "acts", base)
    assert content(path) == content(dataset)
    assert "bytes=5000-" in [asked for _, asked in server.served]


def test_an_interrupted_fetch_is_gone_on_with_by_the_next(clients, server, dataset, base):
    """What an earlier process brought is not brought again, also the half of a file."""
    name = shard_of(dataset)
    done = [path for path in content(dataset) if path not in (name, "zarr.json")]
    partial = base / "acts.zarr.partial"
    for path in done:
        (partial / path).parent.mkdir(parents=True, exist_ok=True)
        (partial / path).write_bytes((dataset / path).read_bytes())
    (partial / f"{name}.partial").write_bytes((dataset / name).read_bytes()[:1000])
    path = fetch(clients, "acts", base)
    assert content(path) == content(dataset)
    assert server.served == [(name, "bytes=1000-"), ("zarr.json", "")]


@pytest.mark.parametrize("suffix", ["", ".partial"])
def test_damage_in_what_an_earlier_run_left_is_mended(clients, dataset, base, suffix):
    """A flipped byte in a finished or a half file leads to its being brought again."""
    name = shard_of(dataset)
    target = base / "acts.zarr.partial" / f"{name}{suffix}"
    target.parent.mkdir(parents=True)
    data = bytearray((dataset / name).read_bytes()[: None if not suffix else 1000])
    data[500] ^= 1
    target.write_bytes(data)
    assert content(fetch(clients, "acts", base)) == content(dataset)


def test_a_byte_flipped_on_the_way_is_detected(clients, server, dataset, base):
    """The copy gets no name, and the file that is wrong is named."""
    name = shard_of(dataset)
    data = bytearray((dataset / name).read_bytes())
    data[-1] ^= 1
    server.replace[name] = bytes(data)
    with pytest.raises(CorruptData) as caught:
        fetch(clients, "acts", base)
    assert name in caught.value.what
    assert not (base / "acts.zarr").exists()
    assert not (base / "acts.zarr.partial" / name).exists()


def test_a_byte_flipped_on_the_cluster_is_detected(clients, server, dataset, base):
    """A shard that no longer matches the manifest is not passed on as good, although it arrives as it is."""
    name = shard_of(dataset)
    with (dataset / name).open("r+b") as file:
        file.write(b"\x55")
    with pytest.raises(CorruptData) as caught:
        fetch(clients, "acts", base)
    assert name in str(caught.value)
    assert not (base / "acts.zarr").exists()


def test_a_copy_that_exists_is_a_conflict(clients, base):
    """Nothing is overwritten, nothing is asked for."""
    fetch(clients, "acts", base)
    with pytest.raises(Conflict, match="exists"):
        fetch(clients, "acts", base)


def test_an_unknown_dataset_is_not_found(clients, base):
    """No folder is made for it."""
    with pytest.raises(NotFound):
        fetch(clients, "other", base)
    assert not (base / "other.zarr.partial").exists()


def test_a_listed_path_that_leads_out_is_refused(clients, server, base, monkeypatch):
    """A dishonest daemon writes nothing beside the copy."""
    evil, get = [DatasetFile(path="../evil", size=1, crc32c=0)], clients[0].get
    monkeypatch.setattr(
        clients[0], "get", lambda path, as_type, **kw: evil if path.endswith("/files") else get(path, as_type)
    )
    with pytest.raises(InvalidInput, match="not a path below"):
        fetch(clients, "acts", base)
    assert not (base / "evil").exists()


def test_what_does_not_fit_is_refused_before_anything_comes(clients, server, base, monkeypatch):
    """With what is needed, what there is, and what to do."""
    monkeypatch.setattr("nnsight_hpc.client.fetch.free_bytes", lambda _: 1000)
    with pytest.raises(HpcError, match="does not fit") as raised:
        fetch(clients, "acts", base)
    assert "1000 B are free" in raised.value.why
    assert server.served == []


def test_a_disk_that_refuses_is_told_and_what_has_come_stays(clients, dataset, base):
    """It is no lost connection, which would be tried again; the next call goes on."""
    allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, allowed[1]))
    try:
        with pytest.raises(HpcError, match="cannot be written") as raised:
            fetch(clients, "acts", base)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, allowed)
    assert "File too large" in raised.value.why
    assert content(fetch(clients, "acts", base)) == content(dataset)


def test_ctrl_c_says_that_the_copy_stays(clients, dataset, base, monkeypatch, capsys):
    """The next call goes on with it."""

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("nnsight_hpc.client.fetch.download", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch(clients[:1], "acts", base)
    assert "the same command goes on with it" in capsys.readouterr().err
    assert content(fetch(clients, "acts", base)) == content(dataset)


def test_a_dataset_that_is_written_yet_is_a_conflict(clients, server, base):
    """Nothing of it is brought."""
    server.writing["acts"] = RequestStatus(
        id="r-abcdefgh2345", kind="dump", pool="smol", state=RequestState.RUNNING, user="alice"
    )
    with pytest.raises(Conflict, match="not complete"):
        fetch(clients, "acts", base)


def test_a_stream_that_fails_leaves_its_work_to_the_first(clients, dataset, base):
    """One that cannot log in without a person, say."""

    def refuse():
        raise Denied("refused the login")

    helpers = [PatientClient(refuse, peer="nobody", patience=120) for _ in range(2)]
    assert content(fetch([clients[0], *helpers], "acts", base)) == content(dataset)
