"""A pool and a replica as they are stored, and what follows from what is known of them."""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING

import msgspec

from nnsight_hpc.slurm.batch.options import farewell, time_limit
from nnsight_hpc.wire.errors import ErrorReport
from nnsight_hpc.wire.messages import ModelIdentity
from nnsight_hpc.wire.pools import PoolSpec, ReplicaStatus
from nnsight_hpc.wire.states import REPLICA_MOVES, EndCause, ReplicaState, move

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_R = ReplicaState
SPARE = 5.0
"""Seconds that a request is given less than its replica has left."""
UNREGISTERED = (_R.SUBMITTED, _R.PENDING, _R.STARTING)


class Pool(msgspec.Struct, frozen=True, omit_defaults=True):
    """A pool as it is stored: what is wanted, and what was measured of its replicas (times in seconds, of the last one).

    `desired` is how many replicas there are to be now, without successors. `failures` counts replicas in a row that ended
    before they were ready. `gap` says why this site allows no successor beside a replica, if it has refused one.
    """

    spec: PoolSpec
    desired: int
    down: bool = False
    model: ModelIdentity | None = None
    held: ErrorReport | None = None
    failures: int = 0
    gap: str = ""
    gpu_seconds: float = 0.0
    load_seconds: float | None = None
    wait_seconds: float = 0.0
    drain_seconds: float = 0.0

    @property
    def overlaps(self) -> bool:
        """Whether a successor is submitted while its predecessor runs."""
        return self.spec.succession == "overlap" and not self.gap

    @property
    def walltime(self) -> float:
        return float(time_limit(self.spec.time))

    @property
    def farewell(self) -> float:
        """How long before its walltime a replica takes nothing new."""
        return max(SPARE, farewell(time_limit(self.spec.time)))


class Replica(msgspec.Struct, frozen=True, omit_defaults=True):
    """A replica as it is stored.

    `served`: it was ready once. `used`: when it was last given a request, or had answered one. `begin`: when its job may
    start at the earliest. `drain`: it is to end, with the cause `told`; its job is cancelled at `until`, if it is to hurry.
    """

    status: ReplicaStatus
    spec: PoolSpec
    served: bool = False
    used: float = 0.0
    begin: float | None = None
    drain: bool = False
    told: EndCause | None = None
    until: float | None = None

    @property
    def id(self) -> str:
        return self.status.id

    @property
    def state(self) -> ReplicaState:
        return self.status.state

    @property
    def leaves(self) -> bool:
        """Whether it takes nothing new: it was told to end, or ends by itself."""
        return self.drain or self.state == _R.DRAINING

    @property
    def waits(self) -> bool:
        """Whether its job does not run yet."""
        return self.state in (_R.SUBMITTED, _R.PENDING)

    @property
    def serves(self) -> bool:
        return self.state.serves and not self.drain

    @property
    def gpus(self) -> int:
        return self.spec.nodes * (self.spec.gpus_per_node or _gpus_of(self.spec.gres or ""))

    def gpu_seconds(self, now: float) -> float:
        """What it has used: its GPUs since its job began, as far as that is known."""
        begun = self.status.started or (self.status.ready if self.served else None)
        return self.gpus * max(0.0, now - begun) if begun is not None else 0.0


def same_job(replica: Replica, pool: Pool) -> bool:
    """Whether the replica is what a new one would be; when and how many of them there are makes no difference."""
    return job_of(replica.spec) == job_of(pool.spec)


def new_replica_id(pool: str) -> str:
    return f"{pool}-{secrets.token_hex(4)}"


def holds_model(replica: Replica, pool: Pool) -> bool:
    """Whether the replica was to hold the model that the pool is to hold now."""
    return weights(replica.spec) == weights(pool.spec)


def weights(spec: PoolSpec) -> tuple[object, ...]:
    return spec.model, spec.revision, spec.dtype, spec.factory


def wanted(pool: Pool, replicas: Iterable[Replica]) -> list[Replica]:
    """Those that have not ended and are to stay, successors included."""
    if pool.down:
        return []
    return [r for r in replicas if not (r.state.ended or r.leaves) and same_job(r, pool)]


def primaries(replicas: Sequence[Replica]) -> list[Replica]:
    """Of wanted ones those that are no successors; a successor whose predecessor is not wanted any more is none."""
    ids = {replica.id for replica in replicas}
    return [replica for replica in replicas if replica.status.succeeds not in ids]


def measured(pool: Pool, old: Replica, new: Replica, *, now: float, listens: float) -> dict[str, object]:
    """What a change of a replica has taught about its pool: fields of `Pool`, and their new values.

    Parameters
    ----------
    listens
        Since when workers are listened to. One that became ready while nobody listened says nothing of how long it took, where
        anything is known already.
    """
    learnt: dict[str, object] = {}
    status = new.status
    if new.served and not old.served:
        learnt["failures"] = 0
    if status.started is not None and old.status.started is None:
        learnt["wait_seconds"] = max(0.0, status.started - max(status.submitted, new.begin or 0.0))
    if (load := _load_seconds(status)) is not None and _load_seconds(old.status) is None:
        was_heard = status.started is not None and status.started >= listens
        learnt |= {"load_seconds": load} if was_heard or pool.load_seconds is None else {}
    if new.state.ended:
        learnt["gpu_seconds"] = pool.gpu_seconds + new.gpu_seconds(now)
        if old.drain and old.until is None and status.cause == EndCause.DRAINED:
            learnt["drain_seconds"] = max(0.0, now - old.status.changed)
    return learnt


def _load_seconds(status: ReplicaStatus) -> float | None:
    if status.started is None or status.ready is None:
        return None
    return max(0.0, status.ready - status.started)


def advance(current: ReplicaState, to: ReplicaState, *, of: str) -> ReplicaState:
    """Go from `current` to `to` by allowed moves, through the states in between that nobody was there to see.

    A worker that dials a new daemon may be READY while the last thing known of it is that it was submitted.
    """
    for step in (_R.LOADING, _R.READY):
        if to == current or to in REPLICA_MOVES[current]:
            break
        if step in REPLICA_MOVES[current]:
            current = move(current, step, of=of)
    return move(current, to, of=of)


def left(replica: Replica) -> float:
    """Seconds until its walltime ends; infinite where there is none, or none is known."""
    return float("inf") if replica.status.ends is None else replica.status.ends - time.time()


def job_of(spec: PoolSpec) -> PoolSpec:
    """What of a spec makes the job of a replica."""
    return msgspec.structs.replace(spec, replicas=1, idle=None, succession="overlap", policy=None)


def _gpus_of(gres: str) -> int:
    """GPUs in Slurm's ``--gres`` (``gpu``, ``gpu:2``, ``gpu:a100:4``; several are separated by commas)."""
    parts = [one.split(":") for one in gres.split(",")]
    return sum(int(part[-1]) if part[-1].isdecimal() else 1 for part in parts if part[0] == "gpu")
