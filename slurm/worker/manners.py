"""While a worker loads, a neighbour on its machine that serves comes first, such as the one whose place it is to take.

Linux weighs the sessions of a machine against one another (sched(7), "The autogroup feature"), and a job is a session of its
own. Anybody may lower this weight and raise it again, which he may not with the nice value of a process. It costs nothing
while nobody else wants the cores. Where jobs are in control groups with CPU weights, or without the feature, it does nothing.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from nnsight_hpc.slurm.batch.executor import JOB_VARIABLE

_WEIGHT = Path("/proc/self/autogroup")
_LOADING, _SERVING = "5", "0"
"""Nice values: a third of the weight of others. With much less, a load on a busy machine would take for ever."""
_TRIES, _NAP = 50, 0.1
"""The kernel takes one change in 100 ms, of the whole machine (EAGAIN)."""
_JOBS = ("SLURM_STEP_ID", JOB_VARIABLE)
"""One of these is set in a job; elsewhere the session is that of somebody's terminal."""
logger = logging.getLogger(__name__)


def step_back() -> None:
    """From now on other sessions come first."""
    _set(_LOADING)


def step_forward() -> None:
    """From now on this session counts as any other."""
    _set(_SERVING)


def _set(nice: str) -> None:
    if os.environ.keys().isdisjoint(_JOBS):
        return
    for _ in range(_TRIES):
        try:
            _WEIGHT.write_text(nice)
        except BlockingIOError:
            time.sleep(_NAP)
        except OSError:  # a kernel without it, or a container that does not let us
            return
        else:
            return
    logger.warning("this job keeps its weight on the machine's cores: %s is busy", _WEIGHT)
