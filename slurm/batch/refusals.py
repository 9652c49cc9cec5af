"""What sbatch says when it does not take a job, as an error that tells what to check."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from nnsight_hpc.wire.errors import HpcError, InvalidInput, Unreachable

if TYPE_CHECKING:
    from nnsight_hpc.wire.messages import PoolSpec

_NO_ANSWER = re.compile(r"contact slurm controller|timed out|connection refused|unable to establish", re.IGNORECASE)
_ASSOCIATIONS = "see what you may use: sacctmgr show associations user=$USER format=account,partition,qos"
_NODES = "see what nodes have: sinfo -o '%P %D %c %m %G %f'"

CHECKS: tuple[tuple[str, str], ...] = (
    (r"partition", "see the partitions: sinfo -s"),
    (r"unrecognized option|invalid --|invalid option", "correct this option in the pool's sbatch_args"),
    (r"reservation", "see the reservations: scontrol show reservation"),
    (r"qos.*(limit|policy)|policy", "see the limits: sacctmgr show qos; " + _ASSOCIATIONS),
    (r"account|qos", _ASSOCIATIONS),
    (r"time limit", "see the partitions' limits: sinfo -o '%P %l'"),
    (r"node configuration|memory|gres|generic resource|feature|node count|node name|cpu count", _NODES),
)
"""A pattern in sbatch's words, and what its reader should look at; the first that fits counts."""


def refused(words: str, spec: PoolSpec) -> HpcError:
    """The error for what sbatch printed (nothing: it did not end in time)."""
    words = re.sub(r"^sbatch: (error: )?", "", words.strip(), flags=re.MULTILINE)
    if not words or _NO_ANSWER.search(words):
        return Unreachable(
            f"Slurm did not answer when the job of pool {spec.name} was submitted",
            why=words or "sbatch did not end in time",
            next="it may have taken the job all the same: look with squeue --me, then try again",
        )
    checks = (check for pattern, check in CHECKS if re.search(pattern, words, re.IGNORECASE))
    return InvalidInput(
        "Slurm refused the job",
        where=f"pool {spec.name}",
        why=words,
        next=next(checks, "change the pool's Slurm options, and try again"),
    )
