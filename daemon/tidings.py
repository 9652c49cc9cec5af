"""What the story of a pool tells of a change of a replica."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nnsight_hpc.daemon.words import duration, ended_words
from nnsight_hpc.wire.states import ReplicaState

if TYPE_CHECKING:
    from nnsight_hpc.daemon.records import Replica
    from nnsight_hpc.wire.pools import ReplicaStatus

_R = ReplicaState


def tidings(old: Replica | None, new: Replica) -> str:
    """In words what has happened to it; empty for what is not worth telling (a serving replica is busy, or is not)."""
    status = new.status
    if old is None:
        return _begun(new)
    if new.drain and not old.drain and not status.state.ended:
        return f"told to end: {status.reason}"
    if status.job_id != old.status.job_id:
        return f"submitted as job {status.job_id}"
    if status.state == old.state and (status.state != _R.PENDING or status.reason == old.status.reason):
        return ""
    if status.state.serves and old.state.serves:
        return ""
    return _became(status)


def _begun(replica: Replica) -> str:
    status = replica.status
    if status.job_id:
        return f"taken up: job {status.job_id}"
    begin = f", to begin in {duration(replica.begin - status.submitted)}" if replica.begin else ""
    return f"to be submitted as the successor of {status.succeeds}{begin}" if status.succeeds else "to be submitted"


def _became(status: ReplicaStatus) -> str:
    match status.state:
        case _R.PENDING:
            return f"waits: {status.reason}" if status.reason else "waits"
        case _R.STARTING:
            return f"its job runs on {status.host}" if status.host else "its job runs"
        case _R.LOADING:
            return f"its worker has registered from {status.host} and loads the model"
        case _R.READY | _R.BUSY:
            return _serves(status)
        case _R.DRAINING:
            return f"takes nothing new: {status.reason}" if status.reason else "takes nothing new"
        case _:
            return ended_words(status)


def _serves(status: ReplicaStatus) -> str:
    if status.ready is None or status.started is None:
        return "it serves"
    return f"it serves, {duration(status.ready - status.started)} after its job began"
