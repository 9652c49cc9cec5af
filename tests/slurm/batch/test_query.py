"""What is concluded from Slurm's answers: recorded ones, and hostile ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nnsight_hpc.slurm.batch import command
from nnsight_hpc.slurm.batch.executor import JobInfo, JobState
from nnsight_hpc.slurm.batch.query import JobWatch
from nnsight_hpc.wire.errors import InvalidInput, Unreachable

if TYPE_CHECKING:
    from .conftest import Recorded

DETAILS = """JobId=12 JobName=nnsight-hpc-tiny
   UserId=alice(2001) GroupId=alice(2001) MCS_label=N/A
   Priority=4294901759 Nice=0 Account=(null) QOS=(null)
   JobState={state} Reason={reason} Dependency=(null)
   Requeue=0 Restarts=0 BatchFlag=1 Reboot=0 ExitCode={code}
   RunTime=00:00:00 TimeLimit=00:05:00 TimeMin=N/A
"""
UNKNOWN_JOB = {"err": "slurm_load_jobs error: Invalid job id specified\n", "code": 1}


def row(*fields: str) -> str:
    return "\x1f".join(fields) + "\n"


def test_one_squeue_for_all_jobs(recorded: Recorded) -> None:
    """States, reasons in words, hosts and ends of all jobs from one run, each job named twice."""
    running = row("12", "RUNNING", "None", "n1", "1795318839")
    waiting = row("13", "PENDING", "Priority", "n/a", "1795400000")
    recorded.program("squeue", running + waiting)
    found = JobWatch().query(["12", "13"])
    assert JobInfo(JobState.RUNNING, "", "n1", 1795318839.0) == found["12"]
    assert JobState.PENDING is found["13"].state
    assert found["13"].reason.startswith("waits behind jobs of higher priority")
    assert found["13"].ends is None
    assert len(recorded.runs("squeue")) == 1
    assert "--jobs=12,13,12,13" in recorded.runs("squeue")[0]


def test_no_jobs_no_call(recorded: Recorded) -> None:
    """Nothing is asked when there is nothing to ask."""
    recorded.program("squeue")
    assert JobWatch().query([]) == {}
    assert recorded.runs("squeue") == []


def test_one_empty_answer_ends_nothing(recorded: Recorded) -> None:
    """A job that is missing once, and then is there again, has been UNKNOWN in between; scontrol was not asked."""
    recorded.program("scontrol", **UNKNOWN_JOB)
    watch = JobWatch()
    states = []
    for out in (row("12", "RUNNING", "None", "n1", ""), "", row("12", "RUNNING", "None", "n1", ""), ""):
        recorded.program("squeue", out)
        states.append(watch.query(["12"])["12"].state)
    assert states == [JobState.RUNNING, JobState.UNKNOWN, JobState.RUNNING, JobState.UNKNOWN]
    assert recorded.runs("scontrol") == []


def test_a_job_that_is_missing_twice_and_unknown_to_scontrol_has_ended(recorded: Recorded) -> None:
    """And stays so when it is asked for again."""
    recorded.program("squeue")
    recorded.program("scontrol", **UNKNOWN_JOB)
    watch = JobWatch()
    assert [watch.query(["12"])["12"].state for _ in range(3)] == [JobState.UNKNOWN, JobState.ENDED, JobState.ENDED]


def test_a_job_that_scontrol_still_knows_is_not_gone(recorded: Recorded) -> None:
    """Missing in squeue, running for scontrol: no certain answer."""
    recorded.program("squeue")
    recorded.program("scontrol", DETAILS.format(state="RUNNING", reason="None", code="0:0"))
    watch = JobWatch()
    assert [watch.query(["12"])["12"].state for _ in range(3)] == [JobState.UNKNOWN] * 3


@pytest.mark.parametrize(
    "answer",
    [
        {"err": "slurm_load_jobs error: Socket timed out on send/recv operation\n"},  # with exit code 0
        {"err": "slurm_load_jobs error: Socket timed out on send/recv operation\n", "code": 1},
        {"err": "slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n", "code": 1},
        {"code": 1},
        {"out": "squeue: something else entirely\n"},
        {"out": "12\x1fRUNN"},
        {"out": "\x00\x1f\x1f\x1f\x1f\x1f\x1f\n"},
        {"out": "\udcff\udcfe\n"},
    ],
)
def test_an_answer_that_is_not_certain_ends_nothing(recorded: Recorded, answer: dict[str, object]) -> None:
    """However often it comes, and although scontrol knows no such job; what went wrong is told."""
    recorded.program("squeue", **answer)
    recorded.program("scontrol", **UNKNOWN_JOB)
    watch = JobWatch()
    found = [watch.query(["12"])["12"] for _ in range(3)]
    assert [info.state for info in found] == [JobState.UNKNOWN] * 3
    assert all("squeue gave no certain answer" in info.reason for info in found)


def test_rows_beside_a_complaint_are_believed(recorded: Recorded) -> None:
    """A warning on stderr, or a garbled row, makes only the jobs without a row uncertain."""
    recorded.program("squeue", row("12", "RUNNING", "None", "n1", "1") + "???\n", err="squeue: warning: something\n")
    found = JobWatch().query(["12", "13"])
    assert [found[job].state for job in ("12", "13")] == [JobState.RUNNING, JobState.UNKNOWN]


def test_a_program_that_hangs_or_is_missing_is_no_answer(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    """The query says so; the command raises."""
    recorded.program("slow", before="exec /bin/sleep 60")
    with pytest.raises(Unreachable, match=r"did not answer within 0\.2 s"):
        command.run("slow", timeout=0.2)
    monkeypatch.setenv("PATH", str(recorded.folder))
    with pytest.raises(Unreachable, match="squeue cannot be run on this host"):
        command.run("squeue")
    assert JobState.UNKNOWN is JobWatch().query(["12"])["12"].state


@pytest.mark.parametrize(
    ("state", "reason", "code", "words"),
    [
        ("COMPLETED", "None", "0:0", "ended with success"),
        ("FAILED", "NonZeroExitCode", "7:0", "failed with exit code 7"),
        ("FAILED", "NonZeroExitCode", "137:0", "failed with exit code 137, as after signal SIGKILL"),
        ("FAILED", "RaisedSignal:9(Killed)", "0:9", "ended by signal SIGKILL"),
        (
            "FAILED",
            "JobLaunchFailure",
            "0:53",
            "could not be launched: is its folder there, and writable, on the compute nodes?",
        ),
        ("TIMEOUT", "TimeLimit", "0:15", "reached its time limit"),
        ("OUT_OF_MEMORY", "OutOfMemory", "0:125", "ran out of memory: ask for more with mem"),
        ("NODE_FAIL", "NodeDown", "0:0", "a node of it failed"),
        ("PREEMPTED", "None", "0:15", "preempted by another job"),
        ("CANCELLED", "None", "0:9", "cancelled (scancel)"),
    ],
)
def test_an_ended_job_says_how_it_ended(recorded: Recorded, state: str, reason: str, code: str, words: str) -> None:
    """From scontrol, which has the exit code that squeue does not have."""
    recorded.program("squeue", row("12", state, reason, "n1", "1795318839"))
    recorded.program("scontrol", DETAILS.format(state=state, reason=reason, code=code))
    assert JobInfo(JobState.ENDED, words) == JobWatch().query(["12"])["12"]


def test_an_ended_job_needs_no_details_to_have_ended(recorded: Recorded) -> None:
    """When scontrol does not answer, squeue's final state counts; the exit code is then not invented."""
    recorded.program("squeue", row("12", "FAILED", "NonZeroExitCode", "n1", ""))
    recorded.program("scontrol", err="Socket timed out\n", code=1)
    assert JobInfo(JobState.ENDED, "failed") == JobWatch().query(["12"])["12"]


def test_a_state_that_is_not_known_is_shown(recorded: Recorded) -> None:
    """A newer Slurm may have more states: nothing is concluded from them."""
    recorded.program("squeue", row("12", "TELEPORTING", "None", "n1", ""))
    assert JobInfo(JobState.UNKNOWN, "Slurm says TELEPORTING") == JobWatch().query(["12"])["12"]


@pytest.mark.parametrize("job", ["", "-u alice", "12,13", "12_1", "0", "--state=all", "12\n13", "१२"])
def test_what_is_no_job_number_never_reaches_slurm(recorded: Recorded, job: str) -> None:
    """`scancel -u alice` would end everything she has."""
    recorded.program("squeue")
    with pytest.raises(InvalidInput):
        JobWatch().query([job])
    assert recorded.runs("squeue") == []


def test_the_users_settings_do_not_change_answers(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQUEUE_STATES would hide jobs, SCANCEL_INTERACTIVE would wait for an answer; times come as plain seconds."""
    for name, value in {"SQUEUE_STATES": "PD", "SCANCEL_INTERACTIVE": "1", "SLURM_TIME_FORMAT": "relative"}.items():
        monkeypatch.setenv(name, value)
    recorded.program("env-of", before='echo "[$SQUEUE_STATES] [$SCANCEL_INTERACTIVE] [$SLURM_TIME_FORMAT] [$LC_ALL]"')
    assert command.run("env-of").out == "[] [] [%s] [C]\n"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None)
@given(out=st.text(alphabet=st.characters(codec="utf-8") | st.sampled_from("\x1f\n12RUNING"), max_size=60))
def test_no_answer_whatever_breaks_a_query(recorded: Recorded, out: str) -> None:
    """Any bytes: an answer for each job, and never that one has ended that no row names."""
    recorded.program("squeue", out)
    found = JobWatch().query(["12", "777777"])
    assert {"12", "777777"} == set(found)
    assert JobState.ENDED is not found["777777"].state
