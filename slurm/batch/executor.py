"""The contract between the daemon and whatever runs a replica's job: Slurm, or this machine itself."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

from nnsight_hpc.wire.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nnsight_hpc.wire.messages import PoolSpec
    from nnsight_hpc.wire.places import Places

WORKER = "nnsight_hpc.slurm.worker"
"""The module that a job runs."""


class JobState(StrEnum):
    PENDING = "PENDING"  # waits; the reason says for what
    RUNNING = "RUNNING"  # its processes run (whether its worker is ready, only the worker knows)
    ENDED = "ENDED"  # known to have ended; the reason says how
    UNKNOWN = "UNKNOWN"  # no certain answer this time: nothing may be concluded from it


@dataclass(frozen=True)
class JobInfo:
    """What is known of a job.

    Attributes
    ----------
    reason
        In words: what a pending job waits for, how an ended one ended, why nothing is known; empty when it just runs.
    host
        The host of a running job's first process.
    ends
        When a running job's time limit ends it, in seconds since the epoch; None when there is no such limit.
    """

    state: JobState
    reason: str = ""
    host: str = ""
    ends: float | None = None


class Executor(Protocol):
    """Runs the jobs of replicas. Every method may be called from any thread, one at a time."""

    name: str

    def submit(self, replica: str, spec: PoolSpec, places: Places) -> str:
        """Submit the job of a replica and return its job id.

        ``places.replica(replica)`` must exist. Writes ``script`` there; the job writes ``log`` there. Raises
        `InvalidInput` for what the spec has wrong (in sbatch's own words, where it refused the job), `Unreachable` when
        Slurm does not answer, `ReplicaFailed` when the job could not be started for another reason.
        """
        ...

    def script(self, replica: str, spec: PoolSpec, places: Places) -> str:
        """The very text that `submit` would submit; raises `InvalidInput` as `submit` does."""
        ...

    def query(self, jobs: Sequence[str]) -> dict[str, JobInfo]:
        """What is known of each of `jobs`, asking Slurm once for all; a job without a certain answer is UNKNOWN."""
        ...

    def drain(self, job: str) -> None:
        """Send SIGUSR2 to the worker: it finishes what it holds and ends. No effect on a job that does not run."""
        ...

    def cancel(self, job: str) -> None:
        """End a job, waiting or running: SIGTERM, and SIGKILL some seconds later. No effect on an ended one."""
        ...


def executor(name: str) -> Executor:
    """The executor of that name: ``slurm`` or ``embedded`` (local processes); `InvalidInput` for another one."""
    if name == "embedded":
        from nnsight_hpc.slurm.batch.embedded import EmbeddedExecutor  # noqa: PLC0415 - it imports this module

        return EmbeddedExecutor()
    if name == "slurm":
        from nnsight_hpc.slurm.batch.slurm import SlurmExecutor  # noqa: PLC0415 - as above; submitit takes 0.2 s

        return SlurmExecutor()
    raise InvalidInput(f"there is no executor {name!r}", next="use 'slurm' or 'embedded'")
