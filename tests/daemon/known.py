"""Pools and replicas as a daemon knows them, made for tests of what is decided about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msgspec import structs

from nnsight_hpc.daemon.backlog import Demand
from nnsight_hpc.daemon.config import Config
from nnsight_hpc.daemon.decisions import Decision, decide
from nnsight_hpc.daemon.records import Pool, Replica
from nnsight_hpc.wire.places import places_at
from nnsight_hpc.wire.pools import PoolSpec, ReplicaStatus
from nnsight_hpc.wire.states import ReplicaState

NOW = 1_000_000.0
CONFIG = Config(executor="slurm", places=places_at(Path("/nowhere")))


def pool(
    replicas: int | str = 1, *, desired: int | None = None, known: dict[str, Any] | None = None, **spec: Any
) -> Pool:
    """A pool with the least number of replicas; `known`: what is stored of it beside its spec."""
    made = PoolSpec(name="p", model="m", replicas=replicas, **spec)
    return Pool(made, made.least if desired is None else desired, **(known or {}))


def replica(name: str, state: ReplicaState = ReplicaState.READY, *, of: Pool | None = None, **fields: Any) -> Replica:
    """A replica that was submitted an hour ago; `fields` are those of a replica or of its status."""
    own = {key: fields.pop(key) for key in set(fields) & set(Replica.__struct_fields__)}
    status = ReplicaStatus(id=name, pool="p", state=state, job_id="1", submitted=NOW - 3600, changed=NOW - 3600)
    served = state in (ReplicaState.READY, ReplicaState.BUSY)
    made = Replica(structs.replace(status, **fields), (of or pool()).spec, served=served, used=NOW)
    return structs.replace(made, **own)


def decided(pool: Pool, *replicas: Replica, demand: Demand | None = None, now: float = NOW) -> Decision:
    """What is decided when all workers were just heard."""
    return decide(pool, replicas, demand or Demand(), lambda _: now, now=now, config=CONFIG)
