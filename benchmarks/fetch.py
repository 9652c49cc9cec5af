"""Fetching a dataset over SSH, beside OpenSSH's own sftp: the same files through the same sshd, from memory to memory.

``fetch`` as the command runs it (its streams, its checksums), with either transport; sftp copies the folder (``get -r``)
and checks nothing. In turns, medians. Then the same through a relay that adds 40 ms to each round trip, as a cluster in
another city has it: there one stream waits for its window, and several do not.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
from figures import Figure, main

from nnsight_hpc.client import config
from nnsight_hpc.client.fetch import STREAMS, fetch
from nnsight_hpc.client.session import dataset_clients
from nnsight_hpc.storage import CaptureSpec, DatasetWriter, Provenance, TokenTable

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.client.sshd import Sshd

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WIDTH = 2048
BYTES, QUICK_BYTES = 768 << 20, 512 << 20
ROUNDS, QUICK_ROUNDS = 5, 3
GOAL = 0.8
DELAY, FAR_ROUNDS = 40, 3
"""Milliseconds, both ways together."""
_SFTP_SERVER = "/usr/lib/openssh/sftp-server"


def measure(quick: bool) -> Iterator[Figure]:
    with _login_node(QUICK_BYTES if quick else BYTES) as node:
        ways: dict[str, Callable[[], None]] = {
            "sftp": node.sftp,
            "OpenSSH": lambda: node.fetch("openssh", STREAMS),
            "paramiko": lambda: node.fetch("paramiko", STREAMS),
        }
        if not quick:
            ways["OpenSSH, 1 stream"] = lambda: node.fetch("openssh", 1)
            ways["paramiko, 1 stream"] = lambda: node.fetch("paramiko", 1)
        yield from _compare("here", node, ways, QUICK_ROUNDS if quick else ROUNDS, goal=GOAL)
        if not quick:
            with _far_away(node):
                yield from _compare(f"{DELAY} ms away", node, ways, FAR_ROUNDS, goal=None)


def _compare(
    where: str, node: Node, ways: dict[str, Callable[[], None]], rounds: int, *, goal: float | None
) -> Iterator[Figure]:
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            speeds[name].append(node.speed(way))
    for name, found in speeds.items():
        yield Figure(f"{where}: {name} [MiB/s]", median(found), None, ">=", "")
    for name in list(ways)[1:]:
        ratio = median(speeds[name]) / median(speeds["sftp"])
        yield Figure(f"{where}: {name} / sftp", ratio, goal if name == "OpenSSH" else None, ">=", "sftp")


class Node:
    """A login node with a dataset, and the laptop's folder beside it."""

    def __init__(self, folder: Path, sshd: Sshd, environment: dict[str, str], dataset: Path) -> None:
        self.sshd, self.port = sshd, sshd.port
        self._environment, self._dataset, self._copies = environment, dataset, folder / "copies"
        self._bytes = sum(file.stat().st_size for file in dataset.rglob("*") if file.is_file())

    def speed(self, way: Callable[[], None]) -> float:
        """MiB/s of one copy, log-in included."""
        shutil.rmtree(self._copies, ignore_errors=True)
        self._copies.mkdir()
        begun = time.monotonic()
        way()
        return self._bytes / (time.monotonic() - begun) / 2**20

    def sftp(self) -> None:
        options = ["-q", "-r", "-P", str(self.port), "-i", str(self.sshd.folder / "key"), "-s", _SFTP_SERVER]
        known = ["-o", f"UserKnownHostsFile={self._known_hosts()}"]
        source = f"{self.sshd.user}@{self.sshd.host}:{self._dataset}"
        subprocess.run(["sftp", *options, *known, source, self._copies], check=True, stdout=subprocess.DEVNULL)

    def fetch(self, transport: str, streams: int) -> None:
        more = {"port": self.port, "known_hosts": str(self._known_hosts())}
        profile = self.sshd.profile(transport, environment=self._environment, **more)
        config.config_file().unlink(missing_ok=True)
        config.add("uni", profile)
        make = dataset_clients("uni")
        clients = [make(ask=number == 0) for number in range(streams)]
        fetch(clients, self._dataset.stem, self._copies)
        for client in clients:
            client.close()

    def _known_hosts(self) -> Path:
        kind, key, *_ = (self.sshd.folder / "hostkey.pub").read_text().split()
        path = self.sshd.folder / "known_hosts_here"
        path.write_text(f"[{self.sshd.host}]:{self.port} {kind} {key}\n")
        return path


@contextmanager
def _far_away(node: Node) -> Iterator[None]:
    """Reach the node through a relay that adds the delay."""
    with socket.socket() as probe:
        probe.bind((node.sshd.host, 0))
        port = probe.getsockname()[1]
    program = str(Path(__file__).with_name("latency_delay.py"))
    command = [sys.executable, program, str(port), node.sshd.host, str(node.sshd.port), str(DELAY)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as relay:
        try:
            node.port = port
            while not _answers(node.sshd.host, port):
                time.sleep(0.05)
            yield
        finally:
            relay.kill()


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), 1).close()
    except OSError:
        return False
    return True


@contextmanager
def _login_node(size: int) -> Iterator[Node]:
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="nnh-", dir=memory if memory.is_dir() else None) as made:
        folder = Path(made)
        places = {
            "HOME": folder / "home",
            "XDG_RUNTIME_DIR": folder / "run",
            "NNSIGHT_HPC_HOME": folder / "state",
            "NNSIGHT_HPC_CONFIG": folder / "config.toml",
        }
        for path in (places["HOME"], places["XDG_RUNTIME_DIR"], folder / "sshd"):
            path.mkdir(mode=0o700)
        environment = {name: str(path) for name, path in places.items()}
        os.environ |= environment
        dataset = _write(places["NNSIGHT_HPC_HOME"] / "slurm" / "datasets", size)
        with Sshd(folder / "sshd") as sshd:
            yield Node(folder, sshd, environment, dataset)


def _write(folder: Path, size: int) -> Path:
    """A dataset of one capture in float16, in shards of 64 MiB."""
    folder.mkdir(parents=True)
    rows = size // (2 * WIDTH)
    tokens = TokenTable(np.arange(rows), np.arange(0, rows + 1, 256), [f"d{n}" for n in range(rows // 256)])
    capture = CaptureSpec("resid", (WIDTH,), "float16")
    writer = DatasetWriter.create(
        folder / "acts.zarr",
        captures=[capture],
        tokens=tokens,
        provenance=Provenance(model="m"),
        shard_bytes=64 << 20,
    )
    block = np.random.default_rng(0).standard_normal((4096, WIDTH)).astype(np.float16)
    for part in writer.pending():
        with writer.slice(part.number) as opened:
            for row in range(part.start, part.stop, len(block)):
                opened.write("resid", row, block[: part.stop - row])
    writer.finish()
    return writer.path


if __name__ == "__main__":
    main(measure, __doc__ or "")
