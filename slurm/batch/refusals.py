"""What sbatch says when it does not take a job, as an error that tells what to check."""

from __future__ import annotations

import getpass
import re
from typing import TYPE_CHECKING

from nnsight_hpc.slurm.batch.command import run
from nnsight_hpc.wire.errors import HpcError, InvalidInput, Unreachable

if TYPE_CHECKING:
    from nnsight_hpc.wire.pools import PoolSpec

_NO_ANSWER = re.compile(r"contact slurm controller|timed out|connection refused|unable to establish", re.IGNORECASE)
_ASSOCIATIONS = "see what you may use: sacctmgr show associations user=$USER format=account,partition,qos"
_PATIENCE = 5.0  # seconds; a person waits, and can ask for it himself
_BARS = 2  # between three fields
_NODES = "see what nodes have: sinfo -o '%P %D %c %m %G %f'"

CHECKS: tuple[tuple[str, str], ...] = (
    (r"unrecognized option|invalid --|invalid option", "correct this option in the pool's sbatch_args"),
    (r"reservation", "see the reservations: scontrol show reservation"),
    (r"qos.*(limit|policy)|policy", "see the limits: sacctmgr show qos; " + _ASSOCIATIONS),
    (r"account|qos", _ASSOCIATIONS),
    (r"partition", "see the partitions: sinfo -s"),
    (r"time limit", "see the partitions' limits: sinfo -o '%P %l'"),
    (r"node configuration|memory|gres|generic resource|feature|node count|node name|cpu count", _NODES),
)
"""A pattern in sbatch's words, and what its reader should look at; the first that fits counts."""


def refused(words: str, spec: PoolSpec) -> HpcError:
    """The error for what sbatch printed (nothing: it did not end in time).

    Where it is about an account or a QOS, and the site has accounting, it names those that this user may use.
    """
    words = re.sub(r"^(sbatch: )?(error: |allocation failure: )?", "", words.strip(), flags=re.MULTILINE)
    if not words or _NO_ANSWER.search(words):
        return Unreachable(
            f"Slurm did not answer when the job of pool {spec.name} was submitted",
            why=words or "sbatch did not end in time",
            next="it may have taken the job all the same: look with squeue --me, then try again",
        )
    checks = (check for pattern, check in CHECKS if re.search(pattern, words, re.IGNORECASE))
    check = next(checks, "change the pool's Slurm options, and try again")
    return InvalidInput(
        "Slurm refused the job",
        where=f"pool {spec.name}",
        why=words,
        next=(_yours() if check == _ASSOCIATIONS else "") or check,
    )


def _yours() -> str:
    """The accounts, partitions and QOS of this user's associations, in words; nothing without accounting."""
    try:
        whose = f"user={getpass.getuser()}"
        show = ("show", "associations", whose, "format=account,partition,qos")
        answer = run("sacctmgr", "--noheader", "--parsable2", *show, timeout=_PATIENCE)
    except (Unreachable, OSError, KeyError):  # the last two: a user without a name
        return ""
    rows = [line.split("|") for line in answer.out.splitlines() if line.count("|") == _BARS]
    return "use " + "; or ".join(dict.fromkeys(_association(*row) for row in rows)) if rows else ""


def _association(account: str, partition: str, qos: str) -> str:
    words = f"account {account}" + (f" in partition {partition}" if partition else "")
    return words + (f" with qos {' or '.join(qos.split(','))}" if qos else "")
