"""The contract between the daemon and whatever runs a replica's job: Slurm, or this machine itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

from nnsight_hpc.wire.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nnsight_hpc.wire.places import Places
    from nnsight_hpc.wire.pools import PoolSpec
    from nnsight_hpc.wire.states import EndCause

WORKER = "nnsight_hpc.slurm.worker"
"""The module that a job runs."""
JOB_VARIABLE = "NNSIGHT_HPC_JOB"
"""Tells a worker on this machine which process is its job's script, whose id is the job's."""
ENDS_VARIABLE = "NNSIGHT_HPC_ENDS"
"""Tells a worker in a Slurm job when that reaches its time limit, in seconds since the epoch."""


class JobState(StrEnum):
    PENDING = "PENDING"  # waits; the reason says for what
    RUNNING = "RUNNING"  # its processes run (whether its worker is ready, only the worker knows)
    ENDED = "ENDED"  # known to have ended; the reason says how
    UNKNOWN = "UNKNOWN"  # no certain answer this time: nothing may be concluded from it


@dataclass(frozen=True)
class JobInfo:
    """What is known of a job; times are seconds since the epoch.

    Attributes
    ----------
    reason
        In words: what a pending job waits for, how an ended one ended, why nothing is known; empty when it just runs.
    host
        The host of a running job's first process.
    ends
        When a running job's time limit ends it; None when there is no such limit.
    begins
        When a pending job is expected to start, or may start at the earliest; None where nobody knows.
    started
        When a running job began to run.
    cause
        Why an ended job ended; None where nobody knows (what its worker or its script wrote down may say more).
    """

    state: JobState
    reason: str = ""
    host: str = ""
    ends: float | None = None
    begins: float | None = None
    started: float | None = None
    cause: EndCause | None = None


@dataclass(frozen=True)
class Survey:
    """One look at all jobs.

    Attributes
    ----------
    jobs
        What is known of each job that was asked for; one without a certain answer is UNKNOWN.
    ours
        The job of each replica whose home is this one and whose job has not ended, by replica: also of those that nobody
        asked for.
    doubt
        Why `ours` may lack some, in words; empty: it lacks none.
    """

    jobs: dict[str, JobInfo] = field(default_factory=dict)
    ours: dict[str, str] = field(default_factory=dict)
    doubt: str = ""


class Executor(Protocol):
    """Runs the jobs of replicas. Every method may be called from any thread, one at a time."""

    name: str

    def submit(self, replica: str, spec: PoolSpec, places: Places, *, begin: float | None = None) -> str:
        """Submit the job of a replica, to start at `begin` (seconds since the epoch) at the earliest; its job id.

        ``places.replica(replica)`` must exist. Writes ``script`` there; the job writes ``log`` there. Raises
        `InvalidInput` for what the spec has wrong (in sbatch's own words, where it refused the job), `Unreachable` when
        Slurm does not answer, `ReplicaFailed` when the job could not be started for another reason.
        """
        ...

    def script(self, replica: str, spec: PoolSpec, places: Places, *, begin: float | None = None) -> str:
        """The very text that `submit` would submit; raises `InvalidInput` as `submit` does."""
        ...

    def survey(self, jobs: Sequence[str], places: Places) -> Survey:
        """What is known of each of `jobs`, and which jobs of this home there are; at the cost of one of Slurm's programs."""
        ...

    def position(self, job: str) -> int | None:
        """The place of a waiting job among those of its partition, the first is 1; None where that cannot be said.

        Costs a look at the whole queue: for a person who asks.
        """
        ...

    def check(self, spec: PoolSpec) -> None:
        """Raise `InvalidInput`, which names what is allowed, when no nodes are there on which such a job could ever run."""
        ...

    def estimate(self, replica: str, spec: PoolSpec, places: Places) -> tuple[float | None, str]:
        """When the job would start if it was submitted now, where that is known, and the batch system's own words.

        Submits nothing. Raises `InvalidInput` and `Unreachable` as `submit` does.
        """
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
