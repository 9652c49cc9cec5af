"""Where a waiting job stands in the queue of its partition."""

from __future__ import annotations

import re
from typing import NamedTuple

from nnsight_hpc.slurm.batch.command import run
from nnsight_hpc.slurm.batch.survey import SEPARATOR

_FORMAT = SEPARATOR.join(("%i", "%Q", "%r", "%P"))
_IN_LINE = frozenset({"None", "Priority", "Resources"})
"""Reasons of jobs that wait for nothing but their turn; those of others do not stand before anybody."""


class _Waiting(NamedTuple):
    order: tuple[int, int]  # the highest priority first, then the oldest
    job: str
    reason: str
    partitions: frozenset[str]


def position(job: str) -> int | None:
    """The place of a job among those that wait in one of its partitions, the first is 1; runs squeue once.

    None when it does not wait for its turn, and when it waits behind jobs that Slurm does not show (PrivateData).
    """
    answer = run("squeue", "--noheader", "--states=PENDING", f"--format={_FORMAT}")
    line = sorted(one for row in answer.out.splitlines() if (one := _waiting(row)))
    mine = next((one for one in line if one.job == job), None)
    if mine is None:
        return None
    line = [one for one in line if one.partitions & mine.partitions]
    return None if line[0].reason == "Priority" else line.index(mine) + 1


def _waiting(row: str) -> _Waiting | None:
    job, _, rest = row.partition(SEPARATOR)
    priority, _, rest = rest.partition(SEPARATOR)
    reason, _, partitions = rest.partition(SEPARATOR)
    number = re.match(r"\d+", job, re.ASCII)
    if number and priority.isdecimal() and reason in _IN_LINE:
        return _Waiting((-int(priority), int(number[0])), job, reason, frozenset(partitions.split(",")))
    return None
