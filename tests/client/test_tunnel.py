"""Datasets through a real sshd and the real bridge, which reads them without a daemon; with cuts on the way."""

from __future__ import annotations

import subprocess
from functools import partial

import numpy as np
import pytest

from nnsight_hpc.client import config
from nnsight_hpc.client.fetch import fetch
from nnsight_hpc.client.fetch_part import Wanted, fetch_part
from nnsight_hpc.client.session import dataset_clients
from nnsight_hpc.storage import ActivationDataset, CaptureSpec, DatasetWriter, Provenance, TokenTable
from tests.client.cutting import CuttingRelay
from tests.client.program import PROGRAM, call

ROWS, WIDTH, MIB = 8192, 256, 1 << 20


@pytest.fixture
def there(base):
    """A dataset of 16 MiB in 8 shards, where the bridge finds it."""
    folder = base / "state" / "slurm" / "datasets"
    folder.mkdir(parents=True, exist_ok=True)
    rows = np.random.default_rng(3).standard_normal((ROWS, WIDTH)).astype(np.float32)
    captures = [CaptureSpec(name, (WIDTH,), "float32") for name in ("a", "b")]
    tokens = TokenTable(np.arange(ROWS), np.arange(0, ROWS + 1, 128), [f"d{k}" for k in range(ROWS // 128)])
    writer = DatasetWriter.create(
        folder / "acts.zarr", captures=captures, tokens=tokens, provenance=Provenance(model="m"), rows_per_slice=2048
    )
    for part in writer.pending():
        with writer.slice(part.number) as opened:
            opened.write("a", part.start, rows[part.start : part.stop])
            opened.write("b", part.start, -rows[part.start : part.stop])
    writer.finish()
    return folder / "acts.zarr"


@pytest.fixture
def relay(sshd, environment):
    """Makes a way to the login node that is cut."""
    return partial(CuttingRelay, sshd, environment)


@pytest.fixture
def clients(monkeypatch):
    """Two streams, as the profile `uni` that is added gives them."""
    monkeypatch.setattr("nnsight_hpc.client.fetch._WORTH_A_STREAM", 1)
    made = []

    def make(profile):
        config.add("uni", profile)
        client = dataset_clients("uni", patience=120)
        made.extend([client(), client(ask=False)])
        return made

    yield make
    for client in made:
        client.close()


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("streams", [{"paramiko": 2}, {"openssh": 1}], ids=str)
def test_a_copy_outlives_ten_cuts_of_the_tunnel(streams, relay, there, clients, base):
    """It goes on where each file was: hardly a byte comes twice."""
    with relay(every=MIB, cuts=10) as way:
        [(transport, count)] = streams.items()
        path = fetch(clients(way.profile(transport))[:count], "acts", base)
        assert content(path) == content(there)
        assert way.cuts == 10
        # What was on its way at a cut is lost: buffers of sshd, ssh and the two sockets.
        assert way.brought < 16 * MIB + 10 * 2 * MIB


def test_a_part_outlives_a_cut_and_only_its_bytes_travel(relay, there, clients, base):
    """One capture, an eighth of the rows: a sixteenth of the bytes, metadata and what a cut has lost."""
    with relay(every=MIB // 2, cuts=1) as way:
        wanted = Wanted(("b",), tokens=slice(1000, 1000 + ROWS // 8))
        path = fetch_part(clients(way.profile("openssh")), "acts", base, wanted)
        assert way.cuts == 1
        assert way.brought < 3 * MIB
    part, whole = ActivationDataset(path), ActivationDataset(there)
    assert np.array_equal(part["b"][:], whole["b"][1000:2024])


def test_a_dataset_is_read_through_the_tunnel_and_over_a_cut(relay, there, clients):
    """Without a copy: a chunk is brought for what is read of it, and a cut is not noticed."""
    with relay(every=MIB, cuts=1) as way:
        clients(way.profile("paramiko"))
        with ActivationDataset("uni:acts") as remote:
            here = ActivationDataset(there)
            assert np.array_equal(remote["a"][5000:5100], here["a"][5000:5100])
            assert way.brought < MIB // 2
            assert np.array_equal(remote["b"][:2048], here["b"][:2048])
            assert way.cuts == 1


def test_no_daemon_runs_for_ones_own_files(sshd, environment, there, clients, base):
    """Neither before nor after: the bridge has read them."""
    fetch(clients(sshd.profile("openssh", environment=environment)), "acts", base)
    assert not (base / "state" / "slurm" / "lease.json").exists()


def test_a_connection_that_is_held_serves_datasets_too(sshd, environment, there, slurm_server, base):
    """`connect` gives channels to the files as well: no further login."""
    config.add("uni", sshd.profile("paramiko", environment=environment))
    logins = (sshd.folder / "log").read_text().count("Accepted publickey")
    with subprocess.Popen([*PROGRAM, "-c", "uni", "connect"], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr.readline().startswith("Connected to uni")
        assert call("-c", "uni", "fetch", "acts", "--to", str(base))[0] == f"{base / 'acts.zarr'}\n"
        process.terminate()
    assert (sshd.folder / "log").read_text().count("Accepted publickey") - logins == 1
