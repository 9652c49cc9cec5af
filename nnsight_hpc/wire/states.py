"""The states of requests and of replicas, and the only moves between them."""

from __future__ import annotations

from enum import StrEnum
from typing import TypeVar

from nnsight_hpc.wire.errors import Conflict


class RequestState(StrEnum):
    RECEIVED = "RECEIVED"  # its bytes are being stored
    QUEUED = "QUEUED"  # stored, acknowledged, waiting for a worker
    LEASED = "LEASED"  # a worker holds it
    RUNNING = "RUNNING"  # the worker has begun
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    EXPIRED = "EXPIRED"

    @property
    def ended(self) -> bool:
        return not REQUEST_MOVES[self]


class ReplicaState(StrEnum):
    SUBMITTED = "SUBMITTED"  # handed to Slurm (or started, when embedded)
    PENDING = "PENDING"  # Slurm says why
    STARTING = "STARTING"  # the job runs, its worker has not dialled yet
    LOADING = "LOADING"  # the worker reads the weights
    READY = "READY"  # a real forward has been answered
    BUSY = "BUSY"
    DRAINING = "DRAINING"  # finishes what it holds, takes nothing new
    ENDED = "ENDED"

    @property
    def ended(self) -> bool:
        return not REPLICA_MOVES[self]

    @property
    def serves(self) -> bool:
        return self in (ReplicaState.READY, ReplicaState.BUSY)


class EndCause(StrEnum):
    """Why a replica has ended; `ReplicaStatus.reason` says more in words."""

    DRAINED = "DRAINED"  # as it was told: down, a changed pool, a successor that serves, too little time left
    IDLE = "IDLE"  # released, since nobody had asked it for the pool's idle time
    WALLTIME = "WALLTIME"  # Slurm's time limit ended it
    PREEMPTED = "PREEMPTED"
    NODE_FAILED = "NODE_FAILED"  # a node, or the network between nodes
    OUT_OF_MEMORY = "OUT_OF_MEMORY"  # the memory of a node, or of the job's limit
    CANCELLED = "CANCELLED"  # by a person, past us: scancel, a signal
    LOST = "LOST"  # silent for too long, or never registered; we ended its job
    CRASHED = "CRASHED"  # it failed by itself
    NOT_SUBMITTED = "NOT_SUBMITTED"  # there was no job

    @property
    def words(self) -> str:
        """As people read it: ``node failed``."""
        return self.lower().replace("_", " ")

    @property
    def expected(self) -> bool:
        """Whether it was ended as planned."""
        return self in (EndCause.DRAINED, EndCause.IDLE)

    @property
    def blameless(self) -> bool:
        """Whether neither the pool nor a request is to blame: such an end is no failed start, and poisons no request."""
        return self.expected or self in (
            EndCause.WALLTIME,
            EndCause.PREEMPTED,
            EndCause.NODE_FAILED,
            EndCause.CANCELLED,
            EndCause.NOT_SUBMITTED,
        )


_Q, _R = RequestState, ReplicaState

REQUEST_MOVES: dict[RequestState, frozenset[RequestState]] = {
    _Q.RECEIVED: frozenset({_Q.QUEUED, _Q.FAILED}),
    _Q.QUEUED: frozenset({_Q.LEASED, _Q.FAILED, _Q.CANCELLED, _Q.EXPIRED}),
    _Q.LEASED: frozenset({_Q.RUNNING, _Q.QUEUED, _Q.COMPLETED, _Q.FAILED, _Q.CANCELLED}),
    _Q.RUNNING: frozenset({_Q.COMPLETED, _Q.QUEUED, _Q.FAILED, _Q.CANCELLED}),
    _Q.COMPLETED: frozenset(),
    _Q.FAILED: frozenset(),
    _Q.CANCELLED: frozenset(),
    _Q.EXPIRED: frozenset(),
}

REPLICA_MOVES: dict[ReplicaState, frozenset[ReplicaState]] = {
    _R.SUBMITTED: frozenset({_R.PENDING, _R.STARTING, _R.LOADING, _R.ENDED}),
    _R.PENDING: frozenset({_R.STARTING, _R.LOADING, _R.ENDED}),
    _R.STARTING: frozenset({_R.PENDING, _R.LOADING, _R.ENDED}),  # PENDING again: Slurm requeued it
    _R.LOADING: frozenset({_R.READY, _R.DRAINING, _R.ENDED}),
    _R.READY: frozenset({_R.BUSY, _R.DRAINING, _R.ENDED}),
    _R.BUSY: frozenset({_R.READY, _R.DRAINING, _R.ENDED}),
    _R.DRAINING: frozenset({_R.ENDED}),
    _R.ENDED: frozenset(),
}

S = TypeVar("S", RequestState, ReplicaState)


def move(current: S, to: S, *, of: str) -> S:
    """The new state, or `Conflict` when the tables above do not allow the move; to stay where one is, is allowed.

    Parameters
    ----------
    of
        Whose state it is, for the message: ``request r-…`` or ``replica …``.
    """
    moves: frozenset[RequestState] | frozenset[ReplicaState]
    moves = REQUEST_MOVES[current] if isinstance(current, RequestState) else REPLICA_MOVES[current]
    if to == current or to in moves:
        return to
    allowed = ", ".join(sorted(moves)) or "nothing: it has ended"
    raise Conflict(f"{of} is {current} and cannot become {to}", why=f"from {current} it can become {allowed}")
