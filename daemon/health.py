"""Whether a replica is well, and what it has died of. All of it follows from what is known."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nnsight_hpc.daemon.records import UNREGISTERED
from nnsight_hpc.daemon.words import cause_words, duration
from nnsight_hpc.wire.states import EndCause, ReplicaState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nnsight_hpc.daemon.config import Config
    from nnsight_hpc.daemon.records import Replica
    from nnsight_hpc.wire.workers import EndRecord

_SLURM_KNOWS = (EndCause.WALLTIME, EndCause.PREEMPTED, EndCause.NODE_FAILED, EndCause.OUT_OF_MEMORY)
"""What the batch system says for certain, and a worker can only guess."""


def lost(replica: Replica, heard: float, now: float, config: Config) -> str:
    """Why a replica is to be given up; empty when it is not.

    Parameters
    ----------
    heard
        When its worker was last heard, or the daemon began to listen.
    """
    if replica.state == ReplicaState.STARTING:
        runs = now - max(replica.status.started or replica.status.changed, heard)
        if runs > config.register:
            return f"its job ran for {duration(runs)}, and its worker has not registered: see the end of its log"
    elif replica.state not in UNREGISTERED and now - heard > config.lost:
        return f"its worker was not heard for {duration(now - heard)}: it hangs, or its node is cut off"
    return ""


def cause_of(told: EndCause | None, record: EndRecord | None, said: EndCause | None) -> EndCause:
    """Why a replica has ended.

    Parameters
    ----------
    told
        With which cause we have told it to end, if we have.
    record
        What its worker, or the job's script, has written down.
    said
        What the batch system says.
    """
    if said in _SLURM_KNOWS:
        return said
    if record is None:
        return told or said or EndCause.CRASHED
    if told is not None and told.expected and record.cause in (EndCause.DRAINED, EndCause.CANCELLED):
        return told
    return record.cause


def why_ended(replica: Replica, cause: EndCause, record: EndRecord | None, said: str) -> str:
    """The reason that people read: why it was told to end, or what it has written down, or what the batch system says."""
    if cause == replica.told and replica.status.reason:
        return replica.status.reason
    own = record.detail if record is not None and record.cause == cause else ""
    return own or said or cause_words(cause)


def is_failed_start(replica: Replica, cause: EndCause) -> bool:
    """Whether the pool is to blame that the replica has never served: also when its walltime is too short to load."""
    if replica.served or replica.drain:
        return False
    loaded = replica.state == ReplicaState.LOADING
    return not cause.blameless or (cause == EndCause.WALLTIME and loaded)


def unserved(replicas: Sequence[Replica]) -> int:
    """How many replicas in a row, up to the one that ended last, have ended before they could serve."""
    count = 0
    for replica in sorted(replicas, key=lambda replica: replica.status.changed, reverse=True):
        if not replica.state.ended or replica.told in (EndCause.DRAINED, EndCause.IDLE):
            continue
        if replica.served:
            break
        count += 1
    return count
