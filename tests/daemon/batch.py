"""A batch system for tests of the daemon: local jobs that wait, that have a walltime, and that Slurm's whims befall.

What it is to do lies in ``batch.json`` in the daemon's home, and may be changed at any time (`Batch.rules`):

- ``wait``: seconds that a job waits in the queue;
- ``refuse``: any job is refused with these words; ``refuse_later``: only one that is to begin later (a successor);
- ``away``: nothing answers, for this reason; with ``lost_answer`` a job is submitted all the same;
- ``causes``: by the number of a job, why it has ended;
- ``kill_daemon``: the daemon dies when its job was submitted, before it knows.

Each look at the jobs is a line of the file ``looks``.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from nnsight_hpc.slurm.batch.embedded import EmbeddedExecutor
from nnsight_hpc.slurm.batch.executor import JobInfo, JobState, Survey
from nnsight_hpc.slurm.batch.options import time_limit
from nnsight_hpc.wire.errors import InvalidInput, Unreachable
from nnsight_hpc.wire.files import write_atomically
from nnsight_hpc.wire.states import EndCause

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nnsight_hpc.wire.places import Places
    from nnsight_hpc.wire.pools import PoolSpec, ReplicaStatus


PROLOG = "the prolog has run"
"""What the batch system writes into a job's log before it begins."""


class Batch(EmbeddedExecutor):
    """Its jobs get ``--begin TIME --end TIME``, and are to keep to that themselves."""

    def __init__(self, worker: str, home: Path) -> None:
        super().__init__(worker, grace=2.0)
        self._home = home

    def submit(self, replica: str, spec: PoolSpec, places: Places, *, begin: float | None = None) -> str:
        rules = self._rules()
        if refusal := rules.get("refuse") or (begin is not None and rules.get("refuse_later")):
            raise InvalidInput("sbatch refused the job", why=refusal)
        if rules.get("away") and not rules.get("lost_answer"):
            raise Unreachable("sbatch did not answer", why=rules["away"])
        starts = max(begin or 0.0, time.time()) + rules.get("wait", 0.0)
        known = {"starts": starts, "ends": starts + time_limit(spec.time)}
        write_atomically(places.replica(replica) / "batch.json", json.dumps(known).encode())
        (places.replica(replica) / "log").write_text(f"{PROLOG}\n")
        job = super().submit(replica, spec, places)
        _replica_of(self._home, job).write_text(replica)
        if rules.get("kill_daemon"):
            self._home.joinpath("batch.json").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        if rules.get("away"):
            raise Unreachable("sbatch did not answer", why=rules["away"])
        return job

    def script(self, replica: str, spec: PoolSpec, places: Places, *, begin: float | None = None) -> str:
        command = [sys.executable, "-m", self._worker, "--home", str(places.home), "--replica", replica]
        return f"#!/bin/bash\nexec {shlex.join(command)}\n"

    def survey(self, jobs: Sequence[str], places: Places) -> Survey:
        with (self._home / "looks").open("a") as file:
            file.write(f"{time.time()}\n")
        if away := self._rules().get("away"):
            return Survey({job: JobInfo(JobState.UNKNOWN) for job in jobs}, doubt=away)
        return super().survey(jobs, places)

    def position(self, job: str) -> int | None:
        return 7

    def _info(self, job: str) -> JobInfo:
        info, known = super()._info(job), self._known(job)
        cause = self._rules().get("causes", {}).get(job)
        if info.state == JobState.ENDED:
            over = EndCause.WALLTIME if time.time() >= known["ends"] else None
            return JobInfo(JobState.ENDED, info.reason, cause=EndCause(cause) if cause else over or info.cause)
        if time.time() < known["starts"]:
            return JobInfo(JobState.PENDING, "others come first", begins=known["starts"])
        return JobInfo(JobState.RUNNING, host="n1", started=known["starts"], ends=known["ends"])

    def _known(self, job: str) -> dict[str, float]:
        replica = _replica_of(self._home, job).read_text()
        return json.loads((self._home / "replicas" / replica / "batch.json").read_bytes())

    def _rules(self) -> dict[str, Any]:
        path = self._home / "batch.json"
        return json.loads(path.read_bytes()) if path.exists() else {}


def set_rules(home: Path, **rules: Any) -> None:
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomically(home / "batch.json", json.dumps(rules).encode())


def _replica_of(home: Path, job: str) -> Path:
    """The file that names a job's replica. The time in a job's id may seem to move a little."""
    return home / f"job-{job.partition(':')[0]}"


def by_hand(script: Path) -> str:
    """Submit a script without the daemon; the number of its process, with which the job's id begins."""
    folder, now = script.parent, time.time()
    write_atomically(folder / "batch.json", json.dumps({"starts": now, "ends": now + 600}).encode())
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent / "jobs")}
    process = psutil.Popen(["bash", "script"], cwd=folder, env=environment, start_new_session=True)
    _replica_of(folder.parents[1], str(process.pid)).write_text(folder.name)
    return str(process.pid)


def looks(home: Path) -> list[float]:
    """When the jobs were looked at."""
    path = home / "looks"
    return [float(line) for line in path.read_text().splitlines()] if path.exists() else []


def is_gone(replica: ReplicaStatus) -> bool:
    """Whether the process of its job has ended; the daemon may not have asked for its exit code yet."""
    try:
        return psutil.Process(int(replica.job_id.split(":")[0])).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
