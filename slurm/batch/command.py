"""The one place that runs Slurm's programs (sbatch alone is run by submitit)."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nnsight_hpc.wire.errors import Unreachable

if TYPE_CHECKING:
    from collections.abc import Sequence

_MEDDLERS = ("SQUEUE_", "SCANCEL_", "SCONTROL_", "SINFO_")
"""Variables with these prefixes are options in disguise: SQUEUE_STATES hides jobs, SCANCEL_INTERACTIVE asks questions."""


@dataclass(frozen=True)
class Answer:
    """What a program printed, and its exit code."""

    code: int
    out: str
    err: str


def run(*command: str, timeout: float = 30.0, given: str = "", without: Sequence[str] = ()) -> Answer:
    """Run one of Slurm's programs, in plain English and with times as seconds since the epoch.

    It reads `given`, and does not see the variables `without`. Raises `Unreachable` when it is not there or does not end
    within `timeout` seconds (Slurm's own limit is 10 s for one message). An answer with an exit code other than 0 is an
    answer: the caller knows what it means.
    """
    hidden = (*_MEDDLERS, *without)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    try:
        ended = subprocess.run(
            command,
            check=False,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout,
            input=given,
            env=environment | {"LC_ALL": "C", "SLURM_TIME_FORMAT": "%s"},
        )
    except OSError as error:
        raise no_slurm(command[0], str(error)) from None
    except subprocess.TimeoutExpired:
        raise Unreachable(f"{command[0]} did not answer within {timeout:g} s", next="try again later") from None
    return Answer(ended.returncode, ended.stdout, ended.stderr)


def no_slurm(program: str, why: str) -> Unreachable:
    return Unreachable(
        f"Slurm's program {program} cannot be run on this host",
        why=why,
        next="run the daemon where sbatch and squeue work: on a login node, with Slurm's folder on PATH",
    )
