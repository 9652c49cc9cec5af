"""Replicas as processes of this machine, for use without Slurm.

A worker runs in a session of its own and writes to the replica's log, so that it outlives the daemon that started it.
Its job id is ``PID:TIME``, the time of its start in seconds since the epoch, since Linux gives the pid of an ended
process to another one. A pool's resources and Slurm options have no meaning here.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from functools import partial
from typing import TYPE_CHECKING

import psutil

from nnsight_hpc.slurm.batch.executor import WORKER, JobInfo, JobState
from nnsight_hpc.slurm.batch.reasons import end_in_words
from nnsight_hpc.slurm.batch.script import setup_lines, worker_command
from nnsight_hpc.wire.errors import InvalidInput, ReplicaFailed
from nnsight_hpc.wire.files import write_atomically

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nnsight_hpc.wire.messages import PoolSpec
    from nnsight_hpc.wire.places import Places

_CLOCK_STEP = 2.0
"""Seconds by which a process's start may seem to move when the clock is set (psutil adds it to the boot time)."""


class EmbeddedExecutor:
    """Runs each replica's worker as one local process.

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

    def submit(self, replica: str, spec: PoolSpec, places: Places) -> str:
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
            job = f"{child.pid}:{psutil.Process(child.pid).create_time():.2f}"
        except (OSError, psutil.Error) as error:
            raise ReplicaFailed("the worker could not be started", where=str(folder), why=str(error)) from None
        self._children[job] = child
        return job

    def script(self, replica: str, spec: PoolSpec, places: Places) -> str:
        if spec.nodes * spec.tasks_per_node != 1:
            raise InvalidInput(
                f"pool {spec.name} asks for {spec.nodes} x {spec.tasks_per_node} tasks",
                why="without Slurm a replica is one process",
                next="set nodes and tasks_per_node to 1, or use a cluster",
            )
        command = worker_command(self._worker, replica, places, tasks=1)
        return "\n".join(["#!/bin/bash", *setup_lines(spec), f"exec {command}", ""])

    def query(self, jobs: Sequence[str]) -> dict[str, JobInfo]:
        return {job: self._info(job) for job in jobs}

    def drain(self, job: str) -> None:
        if process := _running(job):
            process.send_signal(signal.SIGUSR2)

    def cancel(self, job: str) -> None:
        """SIGTERM to the worker and its children now; SIGKILL after the grace, by a thread that Python's end awaits."""
        if (process := _running(job)) and _signal_group(process.pid, signal.SIGTERM):
            threading.Thread(target=self._kill_after_grace, args=(job, process.pid), name=f"cancel {job}").start()

    def _kill_after_grace(self, job: str, pid: int) -> None:
        deadline = time.monotonic() + self._grace
        while _running(job) and time.monotonic() < deadline:
            time.sleep(0.1)
        _signal_group(pid, signal.SIGKILL)  # also what the worker left behind

    def _info(self, job: str) -> JobInfo:
        child = self._children.get(job)
        code = child.poll() if child else None  # also reaps it
        if code is not None:
            return JobInfo(JobState.ENDED, end_in_words(max(code, 0), max(-code, 0)))
        if _running(job):
            return JobInfo(JobState.RUNNING, host=socket.gethostname())
        return JobInfo(JobState.ENDED, "its process has ended (how is not known: another daemon had started it)")


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


def _signal_group(pid: int, number: signal.Signals) -> bool:
    """Signal all processes that are still in the group that a worker leads; False when there is none."""
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return False
    return True
