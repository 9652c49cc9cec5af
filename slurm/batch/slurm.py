"""Replicas as Slurm jobs, submitted through submitit with a script of our own, so that nothing is pickled."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from nnsight_hpc.slurm.batch.command import no_slurm, run
from nnsight_hpc.slurm.batch.executor import WORKER, JobInfo
from nnsight_hpc.slurm.batch.options import check_mpi
from nnsight_hpc.slurm.batch.query import JobWatch, check_job
from nnsight_hpc.slurm.batch.refusals import refused
from nnsight_hpc.slurm.batch.script import sbatch_script
from nnsight_hpc.wire.errors import ReplicaFailed, Unreachable

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from nnsight_hpc.wire.messages import PoolSpec
    from nnsight_hpc.wire.places import Places

_LOG = logging.getLogger(__name__)
_SBATCH_TIMEOUT = 60  # seconds; sbatch itself retries for a while when the controller is busy
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

    def submit(self, replica: str, spec: PoolSpec, places: Places) -> str:
        folder = places.replica(replica)
        text = self.script(replica, spec, places)
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

    def script(self, replica: str, spec: PoolSpec, places: Places) -> str:
        return sbatch_script(replica, spec, places, worker=self._worker, mpi=_mpi(spec))

    def query(self, jobs: Sequence[str]) -> dict[str, JobInfo]:
        return self._watch.query(jobs)

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


def _mpi(spec: PoolSpec) -> str:
    """What srun is to offer the tasks; for ``auto`` PMIx, which Open MPI needs, where this Slurm has it."""
    if spec.mpi != "auto":
        return check_mpi(spec.mpi)
    if spec.nodes * spec.tasks_per_node == 1:
        return "none"
    answer = run("srun", "--mpi=list")
    offered = (answer.out + answer.err).replace(",", " ").split()
    return "pmix" if any(word.startswith("pmix") for word in offered) else "pmi2"


def _scancel(*arguments: str) -> None:
    answer = run("scancel", *arguments)
    if answer.code and "Invalid job id" not in answer.err and "already completing or completed" not in answer.err:
        raise Unreachable(f"scancel failed for job {arguments[-1]}", why=answer.err.strip())
