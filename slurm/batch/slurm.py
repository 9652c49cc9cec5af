"""Replicas as Slurm jobs, submitted through submitit with a script of our own, so that nothing is pickled."""

from __future__ import annotations

import logging
import os
import re
import time
from typing import TYPE_CHECKING

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from nnsight_hpc.slurm.batch.command import no_slurm, run
from nnsight_hpc.slurm.batch.executor import WORKER
from nnsight_hpc.slurm.batch.fits import check_fits
from nnsight_hpc.slurm.batch.nodes import list_nodes
from nnsight_hpc.slurm.batch.position import position
from nnsight_hpc.slurm.batch.refusals import refused
from nnsight_hpc.slurm.batch.script import sbatch_script
from nnsight_hpc.slurm.batch.survey import JobWatch, check_job
from nnsight_hpc.wire.errors import ReplicaFailed, Unreachable

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from nnsight_hpc.slurm.batch.executor import Survey
    from nnsight_hpc.slurm.batch.nodes import Nodes
    from nnsight_hpc.wire.places import Places
    from nnsight_hpc.wire.pools import PoolSpec

_LOG = logging.getLogger(__name__)
_SBATCH_TIMEOUT = 60  # seconds; sbatch itself retries for a while when the controller is busy
_STARTS = re.compile(r"Job \S+ to start at (?P<start>\d+) (?P<how>.+)")
_NODES_KEPT = 300.0  # seconds
_DEFAULTS = ("partition", "account", "qos", "constraint", "reservation")


class SlurmExecutor:
    """Runs each replica's worker as one Slurm job.

    Parameters
    ----------
    worker
        The module that is run, with ``--home HOME --replica ID``.
    """

    name = "slurm"

    def __init__(self, worker: str = WORKER) -> None:
        self._worker, self._watch = worker, JobWatch()
        self._nodes: tuple[float, list[Nodes]] = (0.0, [])

    def submit(self, replica: str, spec: PoolSpec, places: Places, *, begin: float | None = None) -> str:
        folder = places.replica(replica)
        text = self.script(replica, spec, places, begin=begin)
        try:
            job = _Submission(folder, text, _unwanted_variables(spec)).submit_script()
        except FailedSubmissionError as error:
            raise ReplicaFailed("sbatch did not name a job", where=f"pool {spec.name}", why=str(error)) from None
        except FailedJobError as error:
            raise refused(str(error), spec) from None
        except OSError as error:
            raise ReplicaFailed("the job's script could not be written", where=str(folder), why=str(error)) from None
        _LOG.info("submitted replica %s of pool %s as job %s", replica, spec.name, job)
        return job

    def script(self, replica: str, spec: PoolSpec, places: Places, *, begin: float | None = None) -> str:
        return sbatch_script(replica, spec, places, worker=self._worker, begin=begin)

    def survey(self, jobs: Sequence[str], places: Places) -> Survey:
        return self._watch.survey(jobs, places)

    def position(self, job: str) -> int | None:
        return position(check_job(job))

    def check(self, spec: PoolSpec) -> None:
        """Against what sinfo says; an answer is kept for five minutes."""
        asked, nodes = self._nodes
        if not nodes or time.monotonic() - asked > _NODES_KEPT:
            nodes = list_nodes()
            self._nodes = (time.monotonic(), nodes)
        check_fits(spec, nodes)

    def estimate(self, replica: str, spec: PoolSpec, places: Places) -> tuple[float | None, str]:
        """What ``sbatch --test-only`` says."""
        text = self.script(replica, spec, places)
        answer = run("sbatch", "--test-only", given=text, without=_unwanted_variables(spec), timeout=_SBATCH_TIMEOUT)
        if answer.code:
            raise refused(answer.err, spec)
        match = _STARTS.search(answer.err)
        return (float(match["start"]), f"it would run {match['how']}") if match else (None, answer.err.strip())

    def drain(self, job: str) -> None:
        """USR2 to the batch script, which hands it on.

        Only to a running job: for a waiting one scancel would try again for a minute.
        """
        _scancel("--state=RUNNING", "--signal=USR2", "--batch", check_job(job))

    def cancel(self, job: str) -> None:
        """Slurm sends CONT and TERM to all processes, and KILL after its own grace (KillWait, 30 s by default)."""
        _scancel(check_job(job))


class _Submission(submitit.SlurmExecutor):  # type: ignore[misc]  # submitit is not typed for strict mypy
    """submitit's way to submit, with our script in place of one that unpickles a callable."""

    def __init__(self, folder: Path, text: str, unwanted: Sequence[str]) -> None:
        try:
            super().__init__(folder)
        except RuntimeError as error:  # it looks for srun
            raise no_slurm("srun", str(error)) from None
        self._text, self._unwanted = text, unwanted

    def submit_script(self) -> str:
        try:
            job = self._submit_command("")
            job.paths.submission_file.replace(self.folder / "script")
        finally:
            for left in self.folder.glob(".submission_file_*"):  # a link to it, or the script that was refused
                left.unlink()
        return str(job.job_id)

    def _make_submission_file_text(self, command: str, uid: str) -> str:  # noqa: ARG002 - submitit's signature
        return self._text

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        unset = [f"--unset={name}" for name in self._unwanted]
        return ["timeout", str(_SBATCH_TIMEOUT), "env", *unset, "LC_ALL=C", "sbatch", str(submission_file_path)]


def _unwanted_variables(spec: PoolSpec) -> list[str]:
    """Variables that would override the script's options (sbatch(1), INPUT ENVIRONMENT VARIABLES).

    A user's own default partition, account and the like stays where the pool leaves it open.
    """
    wanted = {f"SBATCH_{key.upper()}" for key in _DEFAULTS if getattr(spec, key) is None}
    return [name for name in os.environ if name.startswith("SBATCH_") and name not in wanted]


def _scancel(*arguments: str) -> None:
    answer = run("scancel", *arguments)
    if answer.code and "Invalid job id" not in answer.err and "already completing or completed" not in answer.err:
        raise Unreachable(f"scancel failed for job {arguments[-1]}", why=answer.err.strip())
