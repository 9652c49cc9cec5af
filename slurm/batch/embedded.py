"""Replicas as processes of this machine, for use without Slurm.

A job's script runs in a session of its own and writes to the replica's log, so that it outlives the daemon that started it.
The ranks of one with tensor parallelism are started by mpirun, each in a process group of its own, but in that session.
A job's id is ``PID:TIME``, the time of its start in seconds since the epoch, since Linux gives the pid of an ended
process to another one. A pool's resources and Slurm options have no meaning here.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import psutil

from nnsight_hpc.slurm.batch.executor import JOB_VARIABLE, WORKER, JobInfo, JobState, Survey
from nnsight_hpc.slurm.batch.reasons import end_in_words
from nnsight_hpc.slurm.batch.script import CANCELLED, local_script
from nnsight_hpc.wire.errors import InvalidInput, ReplicaFailed
from nnsight_hpc.wire.files import write_atomically
from nnsight_hpc.wire.states import EndCause

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from nnsight_hpc.wire.places import Places
    from nnsight_hpc.wire.pools import PoolSpec

_CLOCK_STEP = 2.0
"""Seconds by which a process's start may seem to move when the clock is set (psutil adds it to the boot time)."""


class EmbeddedExecutor:
    """Runs each replica's worker as one local process, or as several below mpirun.

    Parameters
    ----------
    worker
        The module that is run, with ``--home HOME --replica ID``.
    grace
        Seconds between SIGTERM and SIGKILL when a job is cancelled.
    """

    name = "embedded"

    def __init__(self, worker: str = WORKER, *, grace: float = 10.0) -> None:
        self._worker, self._grace = worker, grace
        self._children: dict[str, subprocess.Popen[bytes]] = {}  # only a parent learns an exit code

    def submit(self, replica: str, spec: PoolSpec, places: Places, *, begin: float | None = None) -> str:  # noqa: ARG002 - see below
        """Starts it at once: without a time limit there is no successor, and `begin` is not used."""
        folder = places.replica(replica)
        text = self.script(replica, spec, places)
        try:
            write_atomically(folder / "script", text.encode())
            with open(folder / "log", "ab", opener=partial(os.open, mode=0o600)) as log:
                child = subprocess.Popen(
                    ["bash", "script"],
                    cwd=folder,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            job = _job(psutil.Process(child.pid))
        except (OSError, psutil.Error) as error:
            raise ReplicaFailed("the worker could not be started", where=str(folder), why=str(error)) from None
        self._children[job] = child
        return job

    def script(self, replica: str, spec: PoolSpec, places: Places, *, begin: float | None = None) -> str:  # noqa: ARG002 - as above
        self.check(spec)
        return local_script(replica, spec, places, worker=self._worker)

    def survey(self, jobs: Sequence[str], places: Places) -> Survey:
        for child in list(self._children.values()):
            child.poll()  # also reaps those that nobody asks for any more
        return Survey({job: self._info(job) for job in jobs}, dict(_running_of(places)))

    def position(self, job: str) -> int | None:  # noqa: ARG002 - nothing waits here
        return None

    def check(self, spec: PoolSpec) -> None:
        if spec.nodes != 1:
            raise InvalidInput(
                f"pool {spec.name} asks for {spec.nodes} nodes",
                why="without Slurm there is this machine alone",
                next="set nodes to 1, or use a cluster",
            )
        if spec.tp > 1 and not spec.setup and shutil.which("mpirun") is None:
            raise InvalidInput(
                f"pool {spec.name} asks for {spec.tp} ranks, and there is no mpirun to start them",
                why="without Slurm the ranks of a replica are started by an MPI library's mpirun, which is not on PATH",
                next="install Open MPI (Debian: openmpi-bin), or have the pool's setup load it, or set tp to 1",
            )

    def estimate(self, replica: str, spec: PoolSpec, places: Places) -> tuple[float | None, str]:
        self.script(replica, spec, places)
        return time.time(), "it starts at once, as processes of this machine"

    def drain(self, job: str) -> None:
        if process := _running(job):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGUSR2)

    def cancel(self, job: str) -> None:
        """SIGTERM to the script and its children now; SIGKILL after the grace, by a thread that Python's end awaits."""
        if process := _running(job):
            family = _family(process)
            _terminate(family)
            threading.Thread(target=self._kill_after_grace, args=(job, family), name=f"cancel {job}").start()

    def _kill_after_grace(self, job: str, family: Sequence[psutil.Process]) -> None:
        deadline = time.monotonic() + self._grace
        while _running(job) and time.monotonic() < deadline:
            time.sleep(0.1)
        for process in family:
            with suppress(psutil.Error):
                process.kill()
        _kill_session(family[0].pid)  # also what the worker left behind, and ranks that mpirun could not end

    def _info(self, job: str) -> JobInfo:
        child = self._children.get(job)
        code = child.poll() if child else None
        if code is not None:
            return JobInfo(JobState.ENDED, end_in_words(max(code, 0), max(-code, 0)), cause=_cause(code))
        if process := _running(job):
            return JobInfo(JobState.RUNNING, host=socket.gethostname(), started=process.create_time())
        return JobInfo(JobState.ENDED, "its process has ended (how is not known: another daemon had started it)")


def _cause(code: int) -> EndCause:
    """From the exit code of a script, which is that of its worker unless it was cancelled."""
    if code in (CANCELLED, -signal.SIGTERM):
        return EndCause.CANCELLED
    return EndCause.CRASHED if code else EndCause.DRAINED


def _job(process: psutil.Process) -> str:
    return f"{process.pid}:{process.create_time():.2f}"


def _running_of(places: Places) -> Iterator[tuple[str, str]]:
    """Replicas of this home that run here, and their jobs; one whose script is gone is a job of its own."""
    for process in psutil.process_iter():
        with suppress(psutil.Error, ValueError, IndexError):
            words = process.cmdline()
            home = words.index("--home")
            if words[home + 1 : home + 3] == [str(places.home), "--replica"]:
                script = process.environ().get(JOB_VARIABLE)
                yield words[home + 3], _job(next((p for p in process.parents() if str(p.pid) == script), process))


def _running(job: str) -> psutil.Process | None:
    """The process of a job, unless it has ended (a zombie has) or its pid belongs to another process by now."""
    pid, started = _parts(job)
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - started) < _CLOCK_STEP
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def _parts(job: str) -> tuple[int, float]:
    pid, _, started = job.partition(":")
    try:
        return int(pid), float(started)
    except ValueError:
        raise InvalidInput(f"{job!r} is not a local job", why="ids look like 4711:1700000000.00") from None


def _family(process: psutil.Process) -> list[psutil.Process]:
    """A process, and all that descends from it."""
    with suppress(psutil.NoSuchProcess):
        return [process, *process.children(recursive=True)]
    return [process]


def _terminate(family: Sequence[psutil.Process]) -> None:
    """SIGTERM to all that is in the group which a script leads; one that was run by hand may lead none."""
    try:
        os.killpg(family[0].pid, signal.SIGTERM)
    except ProcessLookupError:
        for process in family:
            with suppress(psutil.Error):
                process.terminate()


def _kill_session(leader: int) -> None:
    """SIGKILL to all processes of the session that a worker leads."""
    for pid in psutil.pids():
        with suppress(ProcessLookupError, PermissionError):
            if os.getsid(pid) == leader:
                os.kill(pid, signal.SIGKILL)
