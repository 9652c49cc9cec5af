"""What is concluded from Slurm's answers: recorded ones, and hostile ones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nnsight_hpc.slurm.batch import command
from nnsight_hpc.slurm.batch.executor import JobInfo, JobState, Survey
from nnsight_hpc.slurm.batch.marks import mark
from nnsight_hpc.slurm.batch.survey import JobWatch
from nnsight_hpc.wire.errors import InvalidInput, Unreachable
from nnsight_hpc.wire.places import places_at
from nnsight_hpc.wire.states import EndCause

if TYPE_CHECKING:
    from .conftest import Recorded

HERE, ELSEWHERE = places_at(Path("/home/alice/here")), places_at(Path("/home/alice/elsewhere"))
DETAILS = """JobId=12 JobName=nnsight-hpc-tiny
   UserId=alice(2001) GroupId=alice(2001) MCS_label=N/A
   Priority=4294901759 Nice=0 Account=(null) QOS=(null)
   JobState={state} Reason={reason} Dependency=(null)
   Requeue=0 Restarts=0 BatchFlag=1 Reboot=0 ExitCode={code}
   RunTime=00:00:00 TimeLimit=00:05:00 TimeMin=N/A
"""
UNKNOWN_JOB = {"err": "slurm_load_jobs error: Invalid job id specified\n", "code": 1}
U, R, E = JobState.UNKNOWN, JobState.RUNNING, JobState.ENDED


def row(*fields: str, comment: str = "") -> str:
    """A line of squeue: id, state, and of reason, host, end, start those that are given."""
    return "\x1f".join((*fields, *("None", "n1", "N/A", "N/A")[len(fields) - 2 :], comment)) + "\n"


def survey(watch: JobWatch, *jobs: str) -> dict[str, JobInfo]:
    return watch.survey(jobs, HERE).jobs


def test_one_squeue_for_all_jobs(recorded: Recorded) -> None:
    """States, reasons in words, hosts, beginnings and ends of all jobs from one run."""
    running = row("12", "RUNNING", "None", "n1", "1795318839", "1795310000")
    waiting = row("13", "PENDING", "Priority", "n/a", "1795400000", "1795390000")
    recorded.program("squeue", running + waiting)
    found = survey(JobWatch(), "12", "13")
    assert JobInfo(R, "", "n1", ends=1795318839.0, started=1795310000.0) == found["12"]
    assert JobState.PENDING is found["13"].state
    assert found["13"].reason.startswith("waits behind jobs of higher priority")
    assert (found["13"].begins, found["13"].ends, found["13"].started) == (1795390000.0, None, None)
    assert len(recorded.runs("squeue")) == 1


def test_the_end_of_a_job_that_has_run_is_not_its_limit(recorded: Recorded) -> None:
    """Slurm shows when a completing job ended, in the place of when its time limit would end it."""
    now = "1795000000"
    recorded.program("squeue", row("12", "COMPLETING", "None", "n1", now) + row("13", "RUNNING", "None", "n1", now))
    found = survey(JobWatch(), "12", "13")
    assert (found["12"].ends, found["13"].ends is not None) == (None, True)


def test_jobs_of_this_home_are_found_without_being_asked_for(recorded: Recorded) -> None:
    """By their comment: not those of another home, of other programs, or that have ended."""
    rows = [
        row("12", "RUNNING", comment=mark("a-1", HERE)),
        row("13", "PENDING", comment=mark("a-2", HERE)),
        row("14", "RUNNING", comment=mark("b-1", ELSEWHERE)),
        row("15", "TIMEOUT", comment=mark("a-3", HERE)),
        row("16", "RUNNING", comment="nnsight-hpc replica a-4"),
        row("17_[1-9]", "PENDING", comment="my \x1f own"),
        row("18", "RUNNING", comment="(null)"),
    ]
    recorded.program("squeue", "".join(rows))
    assert Survey({}, {"a-1": "12", "a-2": "13"}) == JobWatch().survey([], HERE)
    assert JobWatch().survey([], ELSEWHERE).ours == {"b-1": "14"}


def test_one_empty_answer_ends_nothing(recorded: Recorded) -> None:
    """A job that is missing once, and then is there again, has been UNKNOWN in between; scontrol was not asked."""
    recorded.program("scontrol", **UNKNOWN_JOB)
    watch = JobWatch()
    states = []
    for out in (row("12", "RUNNING"), "", row("12", "RUNNING"), ""):
        recorded.program("squeue", out)
        states.append(survey(watch, "12")["12"].state)
    assert states == [R, U, R, U]
    assert recorded.runs("scontrol") == []


def test_a_job_that_is_missing_twice_and_unknown_to_scontrol_has_ended(recorded: Recorded) -> None:
    """And stays so when it is asked for again; each turn runs one program."""
    recorded.program("squeue")
    recorded.program("scontrol", **UNKNOWN_JOB)
    watch = JobWatch()
    assert [survey(watch, "12")["12"].state for _ in range(5)] == [U, U, E, E, E]
    assert (len(recorded.runs("squeue")), recorded.runs("scontrol")) == (4, ["show job 12"])


def test_one_program_a_turn_and_other_jobs_are_not_left_waiting(recorded: Recorded) -> None:
    """While several jobs are looked for, every other turn is for all; a turn for one says nothing of the others."""
    recorded.program("squeue", row("14", "RUNNING", comment=mark("r", HERE)))
    recorded.program("scontrol", **UNKNOWN_JOB)
    watch = JobWatch()
    turns = [watch.survey(["12", "13", "14"], HERE) for _ in range(6)]
    assert [[turn.jobs[job].state for job in ("12", "13", "14")] for turn in turns] == [
        [U, U, R],
        [U, U, R],
        [E, U, U],
        [E, U, R],
        [E, E, U],
        [E, E, R],
    ]
    assert [bool(turn.doubt) for turn in turns] == [False, False, True, False, True, False]
    assert [turn.ours for turn in turns if not turn.doubt] == [{"r": "14"}] * 4
    assert len(recorded.runs("squeue")) + len(recorded.runs("scontrol")) == 6


def test_a_job_that_scontrol_still_knows_is_not_gone(recorded: Recorded) -> None:
    """Missing in squeue, running for scontrol: no certain answer."""
    recorded.program("squeue")
    recorded.program("scontrol", DETAILS.format(state="RUNNING", reason="None", code="0:0"))
    watch = JobWatch()
    assert [survey(watch, "12")["12"].state for _ in range(6)] == [U] * 6
    assert len(recorded.runs("scontrol")) == 2


@pytest.mark.parametrize(
    "answer",
    [
        {"err": "slurm_load_jobs error: Socket timed out on send/recv operation\n"},  # with exit code 0
        {"err": "slurm_load_jobs error: Socket timed out on send/recv operation\n", "code": 1},
        {"err": "slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n", "code": 1},
        {"code": 1},
        {"out": "squeue: something else entirely\n"},
        {"out": "12\x1fRUNN"},
        {"out": row("13", "RUNNING").rstrip("\n")},
        {"out": "\x00\x1f\x1f\x1f\x1f\x1f\x1f\n"},
        {"out": "\udcff\udcfe\n"},
    ],
)
def test_an_answer_that_is_not_certain_ends_nothing(recorded: Recorded, answer: dict[str, object]) -> None:
    """However often it comes, and although scontrol knows no such job; what went wrong is told."""
    recorded.program("squeue", **answer)
    recorded.program("scontrol", **UNKNOWN_JOB)
    watch = JobWatch()
    found = [watch.survey(["12"], HERE) for _ in range(4)]
    assert [turn.jobs["12"].state for turn in found] == [U] * 4
    assert all("squeue gave no certain answer" in turn.doubt for turn in found)
    assert all(turn.doubt == turn.jobs["12"].reason for turn in found)


def test_rows_beside_a_complaint_are_believed(recorded: Recorded) -> None:
    """A warning on stderr, or a garbled row, makes only the jobs without a row uncertain."""
    recorded.program("squeue", row("12", "RUNNING") + "???\n", err="squeue: warning: something\n")
    found = survey(JobWatch(), "12", "13")
    assert [found[job].state for job in ("12", "13")] == [R, U]


def test_a_program_that_hangs_or_is_missing_is_no_answer(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    """The survey says so; the command raises."""
    recorded.program("slow", before="exec /bin/sleep 60")
    with pytest.raises(Unreachable, match=r"did not answer within 0\.2 s"):
        command.run("slow", timeout=0.2)
    monkeypatch.setenv("PATH", str(recorded.folder))
    with pytest.raises(Unreachable, match="squeue cannot be run on this host"):
        command.run("squeue")
    assert U is survey(JobWatch(), "12")["12"].state


@pytest.mark.parametrize(
    ("state", "cause", "words"),
    [
        ("COMPLETED", EndCause.DRAINED, "ended with success"),
        ("FAILED", EndCause.CRASHED, "failed"),
        ("TIMEOUT", EndCause.WALLTIME, "reached its time limit"),
        ("DEADLINE", EndCause.WALLTIME, "reached its deadline"),
        ("OUT_OF_MEMORY", EndCause.OUT_OF_MEMORY, "ran out of memory: ask for more with mem"),
        ("NODE_FAIL", EndCause.NODE_FAILED, "a node of it failed"),
        ("BOOT_FAIL", EndCause.NODE_FAILED, "its nodes could not be started"),
        ("PREEMPTED", EndCause.PREEMPTED, "preempted by another job"),
        ("CANCELLED", EndCause.CANCELLED, "cancelled (scancel)"),
        ("REVOKED", EndCause.CANCELLED, "another cluster of the federation took it"),
    ],
)
def test_every_final_state_is_a_cause(recorded: Recorded, state: str, cause: EndCause, words: str) -> None:
    """From squeue alone: no other program is run for a job that has ended."""
    recorded.program("squeue", row("12", state))
    assert JobInfo(E, words, cause=cause) == survey(JobWatch(), "12")["12"]


@pytest.mark.parametrize(
    ("state", "reason", "code", "words"),
    [
        ("FAILED", "NonZeroExitCode", "7:0", "failed with exit code 7"),
        ("FAILED", "NonZeroExitCode", "137:0", "failed with exit code 137, as after signal SIGKILL"),
        ("FAILED", "RaisedSignal:9(Killed)", "0:9", "ended by signal SIGKILL"),
        ("FAILED", "JobLaunchFailure", "0:53", "could not be launched: is its folder there, and writable, on the "),
        ("TIMEOUT", "TimeLimit", "0:15", "reached its time limit"),
    ],
)
def test_scontrol_says_how_a_job_ended(recorded: Recorded, state: str, reason: str, code: str, words: str) -> None:
    """It has the exit code that squeue does not have, of one that squeue has no more."""
    recorded.program("squeue")
    recorded.program("scontrol", DETAILS.format(state=state, reason=reason, code=code))
    watch = JobWatch()
    assert [survey(watch, "12")["12"].state for _ in range(2)] == [U, U]
    assert survey(watch, "12")["12"].reason.startswith(words)


def test_a_state_that_is_not_known_is_shown(recorded: Recorded) -> None:
    """A newer Slurm may have more states: nothing is concluded from them."""
    recorded.program("squeue", row("12", "TELEPORTING"))
    assert JobInfo(U, "Slurm says TELEPORTING") == survey(JobWatch(), "12")["12"]


@pytest.mark.parametrize("job", ["", "-u alice", "12,13", "12_1", "0", "--state=all", "12\n13", "१२"])
def test_what_is_no_job_number_never_reaches_slurm(recorded: Recorded, job: str) -> None:
    """`scancel -u alice` would end everything she has."""
    recorded.program("squeue")
    with pytest.raises(InvalidInput):
        survey(JobWatch(), job)
    assert recorded.runs("squeue") == []


def test_the_users_settings_do_not_change_answers(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQUEUE_STATES would hide jobs, SCANCEL_INTERACTIVE would wait for an answer; times come as plain seconds."""
    for name, value in {"SQUEUE_STATES": "PD", "SCANCEL_INTERACTIVE": "1", "SLURM_TIME_FORMAT": "relative"}.items():
        monkeypatch.setenv(name, value)
    recorded.program("env-of", before='echo "[$SQUEUE_STATES] [$SCANCEL_INTERACTIVE] [$SLURM_TIME_FORMAT] [$LC_ALL]"')
    assert command.run("env-of").out == "[] [] [%s] [C]\n"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None)
@given(out=st.text(alphabet=st.characters(codec="utf-8") | st.sampled_from("\x1f\n12RUNING"), max_size=60))
def test_no_answer_whatever_breaks_a_survey(recorded: Recorded, out: str) -> None:
    """Any bytes: an answer for each job, and never that one has ended that no row names."""
    recorded.program("squeue", out)
    found = survey(JobWatch(), "12", "777777")
    assert {"12", "777777"} == set(found)
    assert E is not found["777777"].state
