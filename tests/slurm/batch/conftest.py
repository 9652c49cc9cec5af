"""Executors with a tiny worker: local, and on the test cluster; and programs that answer as Slurm's once did."""

from __future__ import annotations

import json
import re
import shlex
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nnsight_hpc.slurm.batch.embedded import EmbeddedExecutor
from nnsight_hpc.slurm.batch.executor import Executor, JobInfo, JobState
from nnsight_hpc.wire.places import Places, places_at
from nnsight_hpc.wire.pools import PoolSpec

from .remote_executor import RemoteExecutor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.cluster import Cluster

HOSTILE_HOME = 'it\'s a "home" #1 $(touch x); é'


@dataclass
class Bench:
    """An executor, where it keeps things, and how to run a tiny worker with it."""

    executor: Executor
    places: Places
    make_folder: Callable[[Path], object]
    jobs: list[str] = field(default_factory=list)

    def spec(self, behaviour: str = "", **options: object) -> PoolSpec:
        path = shlex.quote(str(Path(__file__).parent))
        setup = (f"export PYTHONPATH={path} BEHAVIOUR={behaviour}", *options.pop("setup", ()))
        return PoolSpec(**{"name": "tiny", "model": "none", "time": "10", "setup": setup, **options})

    def submit(self, replica: str, behaviour: str = "", **options: object) -> str:
        self.make_folder(self.places.replica(replica))
        job = self.executor.submit(replica, self.spec(behaviour, **options), self.places)
        self.jobs.append(job)
        return job

    def estimate(self, replica: str, **options: object) -> tuple[float | None, str]:
        return self.executor.estimate(replica, self.spec(**options), self.places)

    def start(self, replica: str, behaviour: str = "", **options: object) -> str:
        """Submit, and wait until the worker is up."""
        job = self.submit(replica, behaviour, **options)
        wait_for((self.places.replica(replica) / "up").exists, lambda: self.log(replica))
        return job

    def until(self, job: str, state: JobState, seconds: float = 120.0) -> JobInfo:
        """What was said of the job when it was in that state: the next answer may be that nobody knows."""
        found: list[JobInfo] = []

        def reached() -> bool:
            found.append(self.info(job))
            return found[-1].state is state

        wait_for(reached, lambda: str(found[-1]), seconds)
        return found[-1]

    def info(self, job: str) -> JobInfo:
        return self.executor.survey([job], self.places).jobs[job]

    def log(self, replica: str) -> str:
        path = self.places.replica(replica) / "log"
        return path.read_text(errors="replace") if path.exists() else ""

    def end(self, replica: str) -> dict[str, str]:
        """What the job's script has written down of its end."""
        path = self.places.replica(replica) / "end.json"
        wait_for(path.exists, lambda: self.log(replica))
        return json.loads(path.read_text())

    def end_all(self) -> None:
        for job in self.jobs:
            self.executor.cancel(job)
        for job in self.jobs:
            self.until(job, JobState.ENDED)


def wait_for(condition: Callable[[], bool], complaint: Callable[[], str], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, complaint()
        time.sleep(0.1)


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Bench]:
    """The embedded executor, in a folder with a hostile name."""
    bench = Bench(
        EmbeddedExecutor("tiny_worker", grace=60.0),
        places_at(tmp_path / HOSTILE_HOME),
        lambda path: path.mkdir(parents=True),
    )
    yield bench
    bench.end_all()


@pytest.fixture
def slurm(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[Bench]:
    """The Slurm executor, run by alice on the login node, in a folder with a hostile name.

    Her environment has a token, and variables that change what Slurm's programs do.
    """
    meddling = {
        "SBATCH_JOB_NAME": "evil",
        "SBATCH_EXPORT": "ALL",
        "SBATCH_ARRAY_INX": "1-3",
        "SQUEUE_STATES": "PENDING",
    }
    executor = RemoteExecutor(cluster, user="alice", env={"SECRET_TOKEN": "hunter2", **meddling})
    home = cluster.home("alice") / HOSTILE_HOME / re.sub(r"\W", "-", request.node.name)
    bench = Bench(executor, places_at(home), lambda path: cluster.run("login", ["mkdir", "-p", path], user="alice"))
    yield bench
    cluster.cancel_all_jobs()
    executor.close()


@pytest.fixture(params=["local", pytest.param("slurm", marks=pytest.mark.cluster)])
def bench(request: pytest.FixtureRequest) -> Bench:
    """Each executor in turn: what the contract says holds for all."""
    return request.getfixturevalue(request.param)


@dataclass
class Recorded:
    """A folder of programs, first on PATH, each of which prints what was recorded and counts its runs."""

    folder: Path

    def program(self, name: str, out: str = "", err: str = "", code: int = 0, before: str = "") -> None:
        (self.folder / f"{name}.out").write_bytes(out.encode("utf-8", "surrogateescape"))
        (self.folder / f"{name}.err").write_text(err)
        here = shlex.quote(str(self.folder))
        lines = [
            "#!/bin/sh",
            before,
            f'echo "$@" >> {here}/{name}.runs',
            f"cat {here}/{name}.out",
            f"cat {here}/{name}.err >&2",
        ]
        (self.folder / name).write_text("\n".join([*lines, f"exit {code}", ""]))
        (self.folder / name).chmod(0o755)

    def runs(self, name: str) -> list[str]:
        path = self.folder / f"{name}.runs"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return Recorded(tmp_path)
