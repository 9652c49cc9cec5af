"""Slurm's reasons, and sbatch's refusals, in sentences."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from nnsight_hpc.slurm.batch.reasons import PENDING, end_in_words, pending_in_words
from nnsight_hpc.slurm.batch.refusals import refused
from nnsight_hpc.wire.errors import InvalidInput, Unreachable
from nnsight_hpc.wire.pools import PoolSpec

if TYPE_CHECKING:
    from .conftest import Recorded


@pytest.mark.parametrize(
    ("reason", "beginning"),
    [
        ("Resources", "next in line, waits for nodes, GPUs or memory"),
        ("None", "Slurm has not looked at the job yet"),
        ("(null)", "Slurm has not looked at the job yet"),
        (
            "ReqNodeNotAvail, UnavailableNodes:n[1-2]",
            "nodes that it needs are down, drained or reserved; often a maint",
        ),
        (
            "Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions",
            "nodes that it nee",
        ),
        ("QOSMaxGRESPerUser", "the limit of the QOS on GPUs and the like (GRES) for each user is reached; see"),
        ("AssocGrpCpuLimit", "the limit of your account on CPUs is reached"),
        ("AssocGrpGRESMinutes", "the limit of your account on the time on GPUs and the like (GRES) is reached"),
        ("QOSGrpNodeLimit", "the limit of the QOS on nodes is reached"),
        ("QOSMaxJobsPerUserLimit", "the limit of the QOS on jobs for each user is reached"),
        ("QOSMaxWallDurationPerJobLimit", "the limit of the QOS on time for each job is reached"),
        ("QOSMinGRES", "asks for less than the QOS wants of GPUs"),
        ("MaxMemPerLimit", "asks for more memory"),
    ],
)
def test_a_reason_is_a_sentence_and_keeps_slurms_word(reason: str, beginning: str) -> None:
    """What it waits for, what to do, and the word to look up."""
    words = pending_in_words(reason)
    assert words.startswith(beginning)
    assert words.endswith(f"[{reason.replace('(null)', 'None')}]")


@pytest.mark.parametrize("reason", ["SomethingNew", "", "Resourcesful", "user's own text; rm -rf"])
def test_an_unknown_reason_is_shown_as_it_is(reason: str) -> None:
    """Nothing is guessed, not even from a beginning that is known."""
    assert reason == pending_in_words(reason)


REASONS = """Prolog Priority Dependency Resources PartitionNodeLimit PartitionTimeLimit PartitionDown PartitionInactive
    JobHeldAdmin JobHeldUser BeginTime Licenses AssociationJobLimit AssociationResourceLimit
    AssociationTimeLimit Reservation ReqNodeNotAvail FrontEndDown SchedDefer NodeDown BadConstraints
    SystemFailure JobLaunchFailure NonZeroExitCode RaisedSignal TimeLimit InactiveLimit InvalidAccount
    InvalidQOS QOSUsageThreshold QOSJobLimit QOSResourceLimit QOSTimeLimit Cleaning QOSNotAllowed
    AccountNotAllowed DependencyNeverSatisfied JobHoldMaxRequeue JobArrayTaskLimit BurstBufferResources
    BurstBufferStageIn BurstBufferOperation PowerNotAvail PowerReserved DeadLine PartitionConfig
    AccountingPolicy FedJobLock OutOfMemory MaxMemPerLimit ReservationDeleted ReservationInvalid Constraints
    WaitingForScheduling None"""
LIMITS = """QOSGrpCpuLimit QOSGrpCPUMinutesLimit QOSGrpCPURunMinutesLimit QOSGrpJobsLimit QOSGrpMemLimit QOSGrpNodeLimit
    QOSGrpSubmitJobsLimit QOSGrpWallLimit QOSMaxCpuPerJobLimit QOSMaxCpuMinutesPerJobLimit QOSMaxNodePerJobLimit
    QOSMaxWallDurationPerJobLimit QOSMaxCpuPerUserLimit QOSMaxJobsPerUserLimit QOSMaxNodePerUserLimit
    QOSMaxSubmitJobPerUserLimit QOSMinCpuNotSatisfied AssocGrpCpuLimit AssocMaxJobsLimit AssocMaxCpuPerJobLimit
    AssocMaxNodePerJobLimit AssocMaxWallDurationPerJobLimit AssocMaxSubmitJobLimit AssocGrpUnknownRunMinutes
    AssocMaxMemPerNode AssocGrpEnergy AssocGrpGRESRunMinutes AssocMaxGRESMinutesPerJob AssocGrpLicense AssocGrpBB
    QOSGrpMemoryRunMinutes QOSMaxMemoryPerUser QOSMinMemory QOSMinNode QOSMinEnergy QOSMaxGRESPerNode QOSMinGRES
    QOSMaxLicensePerUser QOSMinBB MaxBBPerAccount MaxCpuPerAccount MaxGRESPerAccount MaxMemoryPerAccount MaxJobsPerAccount
    MaxSubmitJobsPerAccount AssocGrpBillingRunMinutes QOSMaxBillingMinutesPerJob QOSMinBilling"""


@pytest.mark.parametrize("reason", REASONS.split())
def test_every_reason_has_a_sentence_and_an_action(reason: str) -> None:
    """All that Slurm has had from 20.11 to 25.05 (src/common/job_state_reason.c), without those of limits."""
    sentence, action = PENDING[reason]
    assert sentence
    assert action


@pytest.mark.parametrize("reason", LIMITS.split())
def test_every_limit_says_whose_and_of_what(reason: str) -> None:
    """Names of limits are put together from parts, and so are the words."""
    words = pending_in_words(reason)
    assert re.match(r"(the limit of (the QOS|your account) on |asks for less than the QOS wants of )[^;]+; \w", words)
    assert not re.search(r"on [A-Z][a-z]+(Minutes|Jobs)?[ ;]", words)


@pytest.mark.parametrize(
    ("code", "number", "words"),
    [
        (0, 0, "ended with success"),
        (1, 0, "failed with exit code 1"),
        (0, 15, "ended by signal SIGTERM"),
        (0, 37, "ended by signal 37"),
        (139, 0, "failed with exit code 139, as after signal SIGSEGV"),
        (255, 0, "failed with exit code 255"),
    ],
)
def test_ends_in_words(code: int, number: int, words: str) -> None:
    """Exit codes above 128 are, by the shell's custom, signals; 255 is not."""
    assert words == end_in_words(code, number)


POLICY = """sbatch: error: QOSMaxSubmitJobPerUserLimit
sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's size and/or \
time limits)"""


@pytest.mark.parametrize(
    ("words", "kind", "check"),
    [
        ("sbatch: error: Batch job submission failed: Invalid partition name specified", InvalidInput, "sinfo -s"),
        (
            "sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified",
            InvalidInput,
            "sacctmgr show associations",
        ),
        ("sbatch: error: Batch job submission failed: Invalid account specified", InvalidInput, "sacctmgr"),
        ("sbatch: error: Batch job submission failed: Invalid qos specification", InvalidInput, "sacctmgr"),
        (POLICY, InvalidInput, "sacctmgr show qos"),
        (
            "sbatch: error: Batch job submission failed: Requested time limit is invalid (missing or exceeds some limit)",
            InvalidInput,
            "sinfo -o '%P %l'",
        ),
        ("sbatch: error: the site wants --account=\nsbatch: error: ask helpdesk", InvalidInput, "sacctmgr"),
        ("sbatch: error: Sorry, only on Sundays", InvalidInput, "change the pool's Slurm options"),
        (
            "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation",
            Unreachable,
            "squeue --me",
        ),
        (
            "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)",
            Unreachable,
            "",
        ),
        ("", Unreachable, "squeue --me"),
    ],
)
def test_refusals_say_what_to_check(words: str, kind: type[Exception], check: str) -> None:
    """The words are those of sbatch without its prefix; no answer is told apart from a refusal."""
    error = refused(words, PoolSpec(name="tiny", model="none"))
    assert kind is type(error)
    assert check in error.next
    assert "sbatch: error" not in error.why


def test_a_refused_account_is_told_with_those_that_one_may_use(recorded: Recorded) -> None:
    """Where the site has accounting: an association for each account, some for one partition only."""
    recorded.program("sacctmgr", "lab||normal,long\nguests|gpu|\nlab||normal,long\n")
    spec = PoolSpec(name="tiny", model="none", account="nope")
    words = "sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified"
    assert refused(words, spec).next == "use account lab with qos normal or long; or account guests in partition gpu"
    assert "show associations user=" in recorded.runs("sacctmgr")[0]
    assert "sinfo -s" in refused("sbatch: error: invalid partition specified: nope", spec).next


@pytest.mark.parametrize(
    "answer", [{"err": "You are not running a supported accounting_storage plugin\n", "code": 1}, {}]
)
def test_without_accounting_there_is_still_something_to_look_at(recorded: Recorded, answer: dict[str, object]) -> None:
    """An empty answer, too, names the command."""
    recorded.program("sacctmgr", **answer)
    spec = PoolSpec(name="tiny", model="none", qos="nope")
    assert "sacctmgr show associations" in refused("Invalid qos specification", spec).next
