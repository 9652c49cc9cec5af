"""The bridge that reads datasets itself, as a process of its own: what it answers, and that it ends with its stream."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from nnsight_hpc.client.hello import read_hello
from nnsight_hpc.storage import list_files
from nnsight_hpc.wire.errors import Conflict, CorruptData, HpcError, InvalidInput, NotFound
from nnsight_hpc.wire.http import HttpClient
from nnsight_hpc.wire.messages import DatasetFile, DatasetStatus
from tests.client.program import PROGRAM


@pytest.fixture
def bridge(base, dataset):
    """A client of the bridge, by whom the dataset is found."""
    folder = base / "state" / "slurm" / "datasets"
    folder.mkdir(parents=True)
    dataset.rename(folder / "acts.zarr")
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen([*PROGRAM, "bridge", "--files"], stdin=theirs, stdout=theirs)
    assert read_hello(ours, peer="the bridge").home == str(base / "state" / "slurm")
    streams = [ours]
    client = HttpClient(streams.pop, peer="the bridge")
    yield client
    client.close()
    ours.close()
    assert process.wait(120) == 0


def read(client, path, **limits):
    content = bytearray()
    client.download(f"/v1/datasets/acts/files/{path}", content.extend, **limits)
    return bytes(content)


def test_a_dataset_is_described_listed_and_read(bridge, base):
    """As the daemon does it."""
    folder = base / "state" / "slurm" / "datasets" / "acts.zarr"
    status = bridge.get("/v1/datasets/acts", DatasetStatus)
    assert (status.complete, status.tokens, status.documents) == (True, 2000, 2)
    assert status.captures == ("model.layers.1.output", "model.layers.2.output")
    files = bridge.get("/v1/datasets/acts/files", list[DatasetFile])
    assert [(file.path, file.size) for file in files] == [(file.path, file.bytes) for file in list_files(folder)]
    assert all(read(bridge, file.path) == (folder / file.path).read_bytes() for file in files)


def test_ranges_are_what_was_asked_for(bridge, base):
    """From a byte, to a byte, and beyond the end."""
    path = "tokens/input_ids/c.0"
    whole = (base / "state" / "slurm" / "datasets" / "acts.zarr" / path).read_bytes()
    assert read(bridge, path, start=1000) == whole[1000:]
    assert read(bridge, path, start=3, stop=17) == whole[3:17]
    assert read(bridge, path, stop=1) == whole[:1]
    assert read(bridge, path, start=1000, stop=len(whole) + 5) == whole[1000:]
    with pytest.raises(CorruptData, match="shorter"):
        read(bridge, path, start=len(whole))
    assert read(bridge, path) == whole


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("/v1/datasets/other", NotFound),
        ("/v1/datasets/other/files", NotFound),
        ("/v1/datasets/acts/files/absent", NotFound),
        ("/v1/datasets/acts/files/tokens", NotFound),
        ("/v1/datasets/acts/files/..%2F..%2Flease.json", InvalidInput),
        ("/v1/datasets/..%2Facts/files", NotFound),
        ("/v1/pools", NotFound),
    ],
)
def test_what_is_not_there_or_leads_out_is_refused(bridge, path, error):
    """With the daemon's errors, and the stream goes on."""
    with pytest.raises(error):
        bridge.call("GET", path)
    assert bridge.get("/v1/datasets/acts", DatasetStatus).complete


def test_nothing_else_is_done(bridge):
    """It reads, and changes nothing."""
    with pytest.raises(HpcError, match="501"):
        bridge.call("DELETE", "/v1/datasets/acts")


def test_an_incomplete_dataset_has_no_list_of_files(bridge, base):
    """A copy of it would not be one."""
    metadata = base / "state" / "slurm" / "datasets" / "acts.zarr" / "zarr.json"
    metadata.write_text(metadata.read_text().replace('"complete": true', '"complete": false'))
    assert not bridge.get("/v1/datasets/acts", DatasetStatus).complete
    with pytest.raises(Conflict, match="not complete"):
        bridge.call("GET", "/v1/datasets/acts/files")


def test_it_begins_with_little():
    """It begins anew for each stream, on a login node: without what takes its time to load."""
    code = "import sys, nnsight_hpc.client.files_bridge; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert {"numpy", "zarr", "h5py", "aiohttp", "paramiko"} & set(loaded) == set()
