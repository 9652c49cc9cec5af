"""What those who start and end processes say of it in a job's log: srun, slurmstepd, and Open MPI's mpirun.

Tried with Slurm 22.05 and Open MPI 4.1; the words of later versions are taken from their sources.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from nnsight_hpc.wire.states import EndCause

_LABEL = r"^(?:\d+: )?"
"""srun marks a rank's lines by its number, and those of the step's daemon there, too."""
_SRUN = re.compile(_LABEL + r"srun: error: (?P<node>\S+): tasks? (?P<ranks>[\d,-]+): (?P<how>.+)$", re.MULTILINE)
_MPIRUN = re.compile(
    r"process rank (?P<ranks>\d+) with PID \d+ on node (?P<node>\S+) (?P<how>exited on signal \d+ \([^)]*\))"
)
_MPIRUN_CODE = re.compile(r"Process name: \[\[\d+,\d+\],(?P<ranks>\d+)\]\s+(?P<how>Exit code: +\d+)")
_MEMORY = re.compile(
    _LABEL + r"(?:slurmstepd\S*|srun): error: .*(?:oom[-_ ]kill|out[- ]of[- ]memory|exceeded .*memory limit)",
    re.MULTILINE | re.IGNORECASE,
)
_NODE = re.compile(_LABEL + r"srun: error: Node failure on \S+", re.MULTILINE)
_CANCELLED = re.compile(
    r"slurmstepd\S*: error: \*{3} \S+ \S+ ON \S+ CANCELLED AT \S+ DUE TO (TIME LIMIT|PREEMPTION|NODE FAILURE)"
)
_CAUSES = {
    "TIME LIMIT": EndCause.WALLTIME,
    "PREEMPTION": EndCause.PREEMPTED,
    "NODE FAILURE": EndCause.NODE_FAILED,
}


class Death(NamedTuple):
    """Which ranks ended first, where, and how, in the words of what had started them."""

    ranks: str
    node: str
    how: str


def death(log: str) -> Death | None:
    """What srun or mpirun say of the ranks that ended first, if they say so."""
    for pattern in (_SRUN, _MPIRUN, _MPIRUN_CODE):
        if found := pattern.search(log):
            parts = found.groupdict()
            return Death(parts["ranks"], parts.get("node", ""), re.sub(r"\s+", " ", parts["how"]).lower())
    return None


def slurms_cause(log: str) -> EndCause | None:
    """Why Slurm ended the whole job, where it says so."""
    if found := _CANCELLED.search(log):
        return _CAUSES[found[1]]
    return EndCause.NODE_FAILED if _NODE.search(log) else None


def memory_ran_out(log: str) -> bool:
    """Whether Slurm says that the job used more memory than it has."""
    return _MEMORY.search(log) is not None
