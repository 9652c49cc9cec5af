"""What Slurm knows of jobs, from one squeue for all of them, and never more than it really says.

A job counts as ended when Slurm shows it in a final state, or when two answers in a row do not have it and scontrol does
not know it either: an empty answer alone may be a mistake of a busy controller.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from nnsight_hpc.slurm.batch.command import run
from nnsight_hpc.slurm.batch.executor import JobInfo, JobState
from nnsight_hpc.slurm.batch.reasons import ended_in_words, is_final, pending_in_words
from nnsight_hpc.wire.errors import InvalidInput, Unreachable

if TYPE_CHECKING:
    from collections.abc import Sequence

_SEPARATOR = "\x1f"
_FORMAT = _SEPARATOR.join(("%i", "%T", "%r", "%B", "%e"))  # id, state, reason, first host, end
_JOB = re.compile(r"[1-9][0-9]*\Z")
_PENDING = frozenset(
    {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
)
_RUNNING = frozenset({"RUNNING", "COMPLETING", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED"})
_DETAILS = re.compile(
    r"^\s*JobState=(?P<state>\S+) Reason=(?P<reason>.*?) Dependency=.*?ExitCode=(?P<code>\d+):(?P<signal>\d+)",
    re.MULTILINE | re.DOTALL,
)


class _Row(NamedTuple):
    state: str
    reason: str
    host: str
    ends: str


class JobWatch:
    """Queries that remember which jobs were missing from the last answer."""

    def __init__(self) -> None:
        self._missing: set[str] = set()

    def query(self, jobs: Sequence[str]) -> dict[str, JobInfo]:
        """What is known of each job; runs squeue once, and scontrol once for each that seems to have ended."""
        if not jobs:
            return {}
        rows, doubt = _ask([check_job(job) for job in jobs])
        return {job: self._listed(job, rows[job]) if job in rows else self._not_listed(job, doubt) for job in jobs}

    def _listed(self, job: str, row: _Row) -> JobInfo:
        self._missing.discard(job)
        if is_final(row.state):
            details = _details(job)
            return details if details.state is JobState.ENDED else _in_state(row.state, row.reason)
        info = _in_state(row.state, row.reason)
        if info.state is JobState.RUNNING:
            return replace(info, host=row.host, ends=float(row.ends) if row.ends.isdecimal() else None)
        return info

    def _not_listed(self, job: str, doubt: str) -> JobInfo:
        if doubt:
            return JobInfo(JobState.UNKNOWN, doubt)
        if job not in self._missing:
            self._missing.add(job)
            return JobInfo(
                JobState.UNKNOWN, "squeue does not list the job; it is asked once more before that is believed"
            )
        info = _details(job)
        if info.state is not JobState.ENDED:
            return JobInfo(JobState.UNKNOWN, f"squeue does not list the job, scontrol: {info.reason or info.state}")
        return info


def check_job(job: str) -> str:
    """`job`, or `InvalidInput`: anything but a number would be an option or a filter to Slurm's programs."""
    if not _JOB.match(job):
        raise InvalidInput(f"{job!r} is not the id of a Slurm job", why="ids are numbers")
    return job


def _ask(jobs: Sequence[str]) -> tuple[dict[str, _Row], str]:
    """Rows by job, and why jobs without a row may exist all the same (empty: they do not).

    Each job is named twice: for a single unknown id squeue fails, for a list it leaves it out.
    """
    ids = ",".join([*jobs, *jobs])
    try:
        answer = run("squeue", "--noheader", "--states=all", f"--jobs={ids}", f"--format={_FORMAT}")
    except Unreachable as error:
        return {}, error.what
    parts = [line.split(_SEPARATOR) for line in answer.out.splitlines() if line.strip()]
    rows = {part[0]: _Row(*part[1:]) for part in parts if len(part) == 5 and part[0] in jobs}
    complaint = answer.err.strip() or (f"exit code {answer.code}" if answer.code else "")
    if not complaint and any(len(part) != 5 for part in parts):
        complaint = "its answer is garbled"
    return rows, complaint and f"squeue gave no certain answer: {complaint}"


def _details(job: str) -> JobInfo:
    """What ``scontrol show job`` says; its exit code and signal are the batch script's."""
    try:
        answer = run("scontrol", "show", "job", job)
    except Unreachable as error:
        return JobInfo(JobState.UNKNOWN, error.what)
    if match := _DETAILS.search(answer.out):
        return _in_state(match["state"], match["reason"], int(match["code"]), int(match["signal"]))
    if "Invalid job id" in answer.err:
        return JobInfo(JobState.ENDED, "it has ended, and Slurm has forgotten how")
    return JobInfo(JobState.UNKNOWN, answer.err.strip() or "scontrol gave no answer")


def _in_state(state: str, reason: str, code: int | None = None, signal_number: int = 0) -> JobInfo:
    if is_final(state):
        return JobInfo(JobState.ENDED, ended_in_words(state, reason, code, signal_number))
    if state in _PENDING:
        return JobInfo(JobState.PENDING, pending_in_words(reason if state == "PENDING" else state))
    if state in _RUNNING:
        return JobInfo(JobState.RUNNING, "" if state == "RUNNING" else f"Slurm says {state}")
    return JobInfo(JobState.UNKNOWN, f"Slurm says {state}")
