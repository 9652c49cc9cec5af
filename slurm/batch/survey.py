"""What Slurm knows of our jobs, from one run of one of its programs, and never more than it really says.

A job counts as ended when Slurm shows it in a final state, or when two answers in a row do not have it and scontrol does
not know it either: an empty answer alone may be a mistake of a busy controller.
"""

from __future__ import annotations

import os
import re
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from nnsight_hpc.slurm.batch.command import run
from nnsight_hpc.slurm.batch.executor import JobInfo, JobState, Survey
from nnsight_hpc.slurm.batch.marks import marked
from nnsight_hpc.slurm.batch.reasons import cause_of, ended_in_words, pending_in_words
from nnsight_hpc.wire.errors import InvalidInput, Unreachable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nnsight_hpc.wire.places import Places

SEPARATOR = "\x1f"
_FORMAT = SEPARATOR.join(("%i", "%T", "%r", "%B", "%e", "%S", "%k"))
_JOB = re.compile(r"[1-9][0-9]*\Z")
_LISTED = re.compile(r"[1-9][0-9]*(?:[_+]\S+)?\Z", re.ASCII)  # arrays and heterogeneous jobs, which are not ours, too
_PENDING = frozenset(
    {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
)
_RUNNING = frozenset({"RUNNING", "COMPLETING", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED"})
_DETAILS = re.compile(
    r"^\s*JobState=(?P<state>\S+) Reason=(?P<reason>.*?) Dependency=.*?ExitCode=(?P<code>\d+):(?P<signal>\d+)",
    re.MULTILINE | re.DOTALL,
)
_BELIEVED = 2
"""So many answers in a row must lack a job before scontrol is asked about it."""


class _Row(NamedTuple):
    """A line of squeue, in the order of `_FORMAT`; the comment is last, since anything may be in it."""

    job: str
    state: str
    reason: str
    host: str
    end: str
    start: str
    comment: str

    def info(self) -> JobInfo:
        info = in_state(self.state, self.reason)
        if info.state is JobState.RUNNING:
            ends = (
                None if self.state == "COMPLETING" else _moment(self.end)
            )  # that of a job which has run is when it did
            return replace(info, host=self.host, ends=ends, started=_moment(self.start))
        return replace(info, begins=_moment(self.start)) if info.state is JobState.PENDING else info


class JobWatch:
    """Surveys that remember which jobs were missing from the last answers; for any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._missing: dict[str, int] = {}  # answers in a row that did not have a job
        self._gone: dict[str, JobInfo] = {}  # what scontrol said of one that squeue has no more
        self._asked_scontrol = False

    def survey(self, jobs: Sequence[str], places: Places) -> Survey:
        """Runs squeue for all jobs; or, every other time at most, scontrol for one that seems to be gone."""
        for job in jobs:
            check_job(job)
        with self._lock:
            doubtful = next((job for job in jobs if self._missing.get(job, 0) >= _BELIEVED), None)
            self._asked_scontrol = doubtful is not None and not self._asked_scontrol
            if doubtful and self._asked_scontrol:
                return self._look_for(doubtful, jobs)
            return self._look_at_all(jobs, places)

    def _look_at_all(self, jobs: Sequence[str], places: Places) -> Survey:
        rows, doubt = _ask()
        self._gone = {job: info for job, info in self._gone.items() if job in jobs and job not in rows}
        infos = {job: self._listed(rows[job]) if job in rows else self._not_listed(job, doubt) for job in jobs}
        alive = {row.job: marked(row.comment, places) for row in rows.values() if cause_of(row.state) is None}
        return Survey(infos, {replica: job for job, replica in alive.items() if replica}, doubt)

    def _listed(self, row: _Row) -> JobInfo:
        self._missing.pop(row.job, None)
        return row.info()

    def _not_listed(self, job: str, doubt: str) -> JobInfo:
        if job in self._gone:
            return self._gone[job]
        if doubt:
            return JobInfo(JobState.UNKNOWN, doubt)
        self._missing[job] = self._missing.get(job, 0) + 1
        return JobInfo(JobState.UNKNOWN, "squeue does not list the job; that is not believed before it is looked for")

    def _look_for(self, missing: str, jobs: Sequence[str]) -> Survey:
        info = _details(missing)
        if info.state is JobState.ENDED:
            self._gone[missing] = info
        else:
            info = JobInfo(JobState.UNKNOWN, f"squeue does not list the job, scontrol: {info.reason or info.state}")
        self._missing.pop(missing)  # to be missed again, should scontrol know it
        busy = f"Slurm was asked about job {missing} alone this time"
        infos = {job: self._gone.get(job, JobInfo(JobState.UNKNOWN, busy)) for job in jobs}
        return Survey(infos | {missing: info}, {}, busy)


def check_job(job: str) -> str:
    """`job`, or `InvalidInput`: anything but a number would be an option or a filter to Slurm's programs."""
    if not _JOB.match(job):
        raise InvalidInput(f"{job!r} is not the id of a Slurm job", why="ids are numbers")
    return job


def _ask() -> tuple[dict[str, _Row], str]:
    """All of this user's jobs, also those that have just ended; and why some may lack (empty: none does)."""
    try:
        answer = run("squeue", "--noheader", "--states=all", f"--user={os.getuid()}", f"--format={_FORMAT}")
    except Unreachable as error:
        return {}, error.what
    lines = [line for line in answer.out.split("\n") if line.strip()]
    rows = {row.job: row for row in map(_row, lines) if row}
    garbled = len(rows) < len(lines) or (bool(lines) and not answer.out.endswith("\n"))
    complaint = answer.err.strip() or (f"exit code {answer.code}" if answer.code else "its answer is garbled" * garbled)
    return rows, complaint and f"squeue gave no certain answer: {complaint}"


def _row(line: str) -> _Row | None:
    """What a line says; None for one that is none of squeue's."""
    parts = line.split(SEPARATOR, len(_Row._fields) - 1)
    return _Row(*parts) if len(parts) == len(_Row._fields) and _LISTED.match(parts[0]) else None


def _details(job: str) -> JobInfo:
    """What ``scontrol show job`` says; its exit code and signal are the batch script's."""
    try:
        answer = run("scontrol", "show", "job", job)
    except Unreachable as error:
        return JobInfo(JobState.UNKNOWN, error.what)
    if match := _DETAILS.search(answer.out):
        return in_state(match["state"], match["reason"], int(match["code"]), int(match["signal"]))
    if "Invalid job id" in answer.err:
        return JobInfo(JobState.ENDED, "it has ended, and Slurm has forgotten how")
    return JobInfo(JobState.UNKNOWN, answer.err.strip() or "scontrol gave no answer")


def in_state(state: str, reason: str, code: int | None = None, signal_number: int = 0) -> JobInfo:
    """What follows from Slurm's state and reason, and the exit code and signal of the script where they are known."""
    if cause := cause_of(state):
        return JobInfo(JobState.ENDED, ended_in_words(state, reason, code, signal_number), cause=cause)
    if state in _PENDING:
        return JobInfo(JobState.PENDING, pending_in_words(reason if state == "PENDING" else state))
    if state in _RUNNING:
        return JobInfo(JobState.RUNNING, "" if state == "RUNNING" else f"Slurm says {state}")
    return JobInfo(JobState.UNKNOWN, f"Slurm says {state}")


def _moment(text: str) -> float | None:
    """A time of squeue's, as `command.run` has them printed; ``N/A`` and the like are none."""
    return float(text) if text.isascii() and text.isdecimal() and int(text) else None
