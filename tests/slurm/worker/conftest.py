"""A stand-in daemon, and real workers as processes of this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from nnsight_hpc.wire.logs import readable
from nnsight_hpc.wire.messages import decode, encode
from nnsight_hpc.wire.places import Places, places_at
from nnsight_hpc.wire.pools import PoolSpec
from nnsight_hpc.wire.workers import EndRecord
from tests.slurm.worker.stand_in import StandIn, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


WORKER = ("-m", "nnsight_hpc.slurm.worker")


@dataclass
class Bench:
    """A home with a stand-in daemon and the workers that a test starts."""

    places: Places
    daemon: StandIn
    spec: PoolSpec
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def worker(
        self, replica: str = "w1", *, job: bool = True, program: tuple[str, ...] = WORKER, **environment: str
    ) -> subprocess.Popen[bytes]:
        """Start a worker as an executor would: job.json in place, its output in the replica's log."""
        folder = self.places.replica(replica)
        folder.mkdir(parents=True, exist_ok=True)
        if job:
            (folder / "job.json").write_bytes(encode(self.spec))
        command = [sys.executable, *program, "--home", self.places.home, "--replica", replica]
        with (folder / "log").open("ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, **environment}
            )
        self.processes.append(process)
        return process

    def ready_worker(self, replica: str = "w1", program: tuple[str, ...] = WORKER) -> subprocess.Popen[bytes]:
        process = self.worker(replica, program=program)
        wait_for(lambda: process.poll() is not None or self._is_ready(replica), "a ready worker", 120)
        assert process.poll() is None, self.log(replica)
        return process

    def log(self, replica: str = "w1") -> str:
        return readable((self.places.replica(replica) / "log").read_text())

    def end_record(self, replica: str = "w1") -> EndRecord:
        return decode((self.places.replica(replica) / "end.json").read_bytes(), EndRecord)

    def _is_ready(self, replica: str) -> bool:
        return any(report.replica == replica and report.state == "READY" for report in self.daemon.reports)

    def end_all(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait(120)
        self.daemon.stop()


@pytest.fixture
def bench(tmp_path: Path, tiny_llama: Path) -> Iterator[Bench]:
    """A running stand-in daemon in an empty home, for a pool of the tiny Llama."""
    places = places_at(tmp_path / "home")
    spec = PoolSpec(name="tiny", model=str(tiny_llama))
    bench = Bench(places, StandIn(places, spec), spec)
    bench.daemon.start()
    yield bench
    bench.end_all()


@pytest.fixture(scope="session")
def resident(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Iterator[Bench]:
    """One worker that stays ready for all tests that do not end it."""
    places = places_at(tmp_path_factory.mktemp("resident") / "home")
    spec = PoolSpec(name="tiny", model=str(tiny_llama))
    bench = Bench(places, StandIn(places, spec), spec)
    bench.daemon.start()
    bench.ready_worker()
    yield bench
    bench.end_all()
