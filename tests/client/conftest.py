"""Fixtures: a place of one's own for everything that the client keeps, a daemon, and a login node."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
import pytest

from nnsight_hpc.client.session import dataset_clients
from nnsight_hpc.storage import CaptureSpec, DatasetWriter, Provenance, TokenTable
from tests.client.dashboard import DashboardProcess, places_of
from tests.client.server import Server
from tests.client.sshd import Sshd

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from nnsight_hpc.client.patience import PatientClient
    from tests.daemon.process import DaemonProcess


@pytest.fixture
def base(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that holds home, configuration, state and sockets of the test (its path is short: sockets)."""
    base = tmp_path_factory.mktemp("c")
    for name in ("home", "run"):
        (base / name).mkdir(mode=0o700)
    monkeypatch.setenv("HOME", str(base / "home"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base / "run"))
    monkeypatch.setenv("NNSIGHT_HPC_HOME", str(base / "state"))
    monkeypatch.setenv("NNSIGHT_HPC_CONFIG", str(base / "config" / "config.toml"))
    for name in ("NNSIGHT_HPC_CLUSTER", "NNSIGHT_HPC_SCRATCH", "SSH_AUTH_SOCK"):
        monkeypatch.delenv(name, raising=False)
    return base


@pytest.fixture
def environment(base: Path) -> dict[str, str]:
    """What a program on the login node needs to find the test's places."""
    names = ("HOME", "XDG_RUNTIME_DIR", "NNSIGHT_HPC_HOME", "NNSIGHT_HPC_CONFIG")
    return {name: os.environ[name] for name in names}


@pytest.fixture
def server(base: Path) -> Iterator[Server]:
    """The daemon of the profile `local`."""
    with Server(base / "state" / "embedded", base / "run" / "e.sock") as server:
        yield server


@pytest.fixture
def slurm_server(base: Path) -> Iterator[Server]:
    """The daemon that the bridge finds on the login node."""
    with Server(base / "state" / "slurm", base / "run" / "s.sock", "slurm") as server:
        yield server


@pytest.fixture(scope="session")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with Sshd(tmp_path_factory.mktemp("sshd")) as sshd:
        yield sshd


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A real, complete dataset of two captures, 4 shards each."""
    path = tmp_path / "acts.zarr"
    rows = np.random.default_rng(1).standard_normal((2000, 16)).astype(np.float32)
    captures = [CaptureSpec(f"model.layers.{layer}.output", (16,), "float32") for layer in (1, 2)]
    tokens = TokenTable(np.arange(2000), np.array([0, 1200, 2000]), ["a", "b"])
    writer = DatasetWriter.create(
        path, captures=captures, tokens=tokens, provenance=Provenance(model="test"), rows_per_slice=512
    )
    for part in writer.pending():
        with writer.slice(part.number) as opened:
            for capture in captures:
                opened.write(capture.name, opened.range.start, rows[opened.range.start : opened.range.stop])
    writer.finish()
    return path


@pytest.fixture
def clients(server: Server, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[PatientClient]]:
    """Two streams to a daemon that has the dataset `acts`, which is worth several."""
    monkeypatch.setattr("nnsight_hpc.client.fetch._WORTH_A_STREAM", 1)
    server.datasets["acts"] = dataset
    make = dataset_clients("local", patience=120)
    clients = [make() for _ in range(2)]
    yield clients
    for client in clients:
        client.close()


@pytest.fixture(scope="module")
def dashboard(daemon: DaemonProcess) -> Iterator[DashboardProcess]:
    """The command on the `daemon` of a module, without a browser."""
    with DashboardProcess("--no-browser", environment=places_of(daemon)) as dashboard:
        yield dashboard
