"""Slurm's reasons, and sbatch's refusals, in sentences."""

from __future__ import annotations

import pytest

from nnsight_hpc.slurm.batch.reasons import PENDING, end_in_words, pending_in_words
from nnsight_hpc.slurm.batch.refusals import refused
from nnsight_hpc.wire.errors import InvalidInput, Unreachable
from nnsight_hpc.wire.messages import PoolSpec


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
        ("AssocGrpGRESMinutes", "the limit of your account on GPU time is reached"),
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


def test_every_reason_of_the_manual_has_words() -> None:
    """Those that squeue(1) of 22.05 lists for waiting jobs."""
    manual = """AssociationJobLimit AssociationResourceLimit AssociationTimeLimit BadConstraints BeginTime Cleaning
        Dependency DependencyNeverSatisfied FrontEndDown InactiveLimit InvalidAccount InvalidQOS JobHeldAdmin JobHeldUser
        JobLaunchFailure Licenses NodeDown PartitionDown PartitionInactive PartitionNodeLimit PartitionTimeLimit Priority
        Prolog QOSJobLimit QOSResourceLimit QOSTimeLimit QOSUsageThreshold ReqNodeNotAvail Reservation Resources
        SystemFailure WaitingForScheduling"""
    assert set() == set(manual.split()) - set(PENDING)


@pytest.mark.parametrize(
    ("code", "number", "words"),
    [
        (0, 0, "ended with success"),
        (1, 0, "failed with exit code 1"),
        (0, 15, "ended by signal SIGTERM"),
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
            "sinfo -s",
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
