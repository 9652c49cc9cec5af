"""Pools and their replicas: what is wanted, and what is known. The reconciler acts on it.

There are few of them, so they are kept in memory and written to the database at each change; how many bytes a worker
has loaded changes every few seconds and is not written.
"""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING

import msgspec

from nnsight_hpc.wire.errors import ErrorReport, HpcError, InvalidInput, NotFound, ReplicaFailed, from_report
from nnsight_hpc.wire.messages import ModelIdentity, PoolSpec, PoolStatus, ReplicaStatus, decode, encode
from nnsight_hpc.wire.names import check_name
from nnsight_hpc.wire.states import REPLICA_MOVES, ReplicaState, move

if TYPE_CHECKING:
    import sqlite3
    from typing import Any

    from nnsight_hpc.daemon.changes import Changes
    from nnsight_hpc.daemon.store import Store
    from nnsight_hpc.wire.places import Places

_R = ReplicaState
UNREGISTERED = (_R.SUBMITTED, _R.PENDING, _R.STARTING)
_SHOWN_ENDED = 3
_KEPT_ENDED = 20


class Pool(msgspec.Struct, frozen=True, omit_defaults=True):
    """A pool as it is stored. `failures` counts replicas in a row that ended before they were ready."""

    spec: PoolSpec
    desired: int
    model: ModelIdentity | None = None
    held: ErrorReport | None = None
    failures: int = 0


class Replica(msgspec.Struct, frozen=True, omit_defaults=True):
    """A replica as it is stored: `drain` when it is to end, `served` once it was ready, `cause` in its own words."""

    status: ReplicaStatus
    spec: PoolSpec
    drain: bool = False
    served: bool = False
    cause: str = ""

    @property
    def id(self) -> str:
        return self.status.id

    @property
    def state(self) -> ReplicaState:
        return self.status.state


class Pools:
    """All pools and replicas of a daemon."""

    def __init__(self, store: Store, changes: Changes, places: Places) -> None:
        self._store, self._changes, self._places = store, changes, places
        self._pools: dict[str, Pool] = {}
        self._replicas: dict[str, Replica] = {}

    async def load(self) -> None:
        pools, replicas = await self._store.run(lambda c: (_bodies(c, "pools"), _bodies(c, "replicas")))
        self._pools = {name: decode(body, Pool) for name, body in pools}
        loaded = (decode(body, Replica) for _, body in replicas)
        self._replicas = {r.id: r for r in sorted(loaded, key=lambda r: r.status.submitted)}

    # -- reading -------------------------------------------------------------------------------------------------

    def all(self) -> list[Pool]:
        return list(self._pools.values())

    def names(self) -> list[str]:
        return sorted(self._pools)

    def has_had(self, pool: str, replica: str) -> bool:
        return replica in self._replicas and self._replicas[replica].spec.name == pool

    def find(self, name: str) -> Pool | None:
        return self._pools.get(name)

    def get(self, name: str) -> Pool:
        if name not in self._pools:
            raise NotFound(
                f"there is no pool {name}", why=self._known(), next=f"`nnsight-hpc up {name} --model …` starts one"
            )
        return self._pools[name]

    def accepting(self, name: str) -> Pool:
        """The pool, if a request that is queued for it now will run; raises why not otherwise."""
        pool = self.get(name)
        if refusal := self.refusal(name):
            raise refusal
        return pool

    def refusal(self, name: str) -> HpcError | None:
        """Why requests of this pool will not run, or None."""
        pool = self._pools.get(name)
        if pool is None or pool.desired == 0:
            return NotFound(
                f"pool {name} was taken down",
                next=f"start it again with `nnsight-hpc up {name} --model …`, and send the request again",
            )
        hope = any(not replica.drain for replica in self.replicas(name))
        return from_report(pool.held) if pool.held and not hope else None

    def for_model(self, model: ModelIdentity) -> str:
        """The name of the pool that serves a graph's model; of several the one with most replicas that are ready."""
        serving = [pool for pool in self._pools.values() if pool.desired and _serves(pool, model)]
        if not serving:
            raise NotFound(
                f"no pool serves the model {model.id or '(not named)'}, fingerprint {model.fingerprint or '(none)'}",
                why="\n".join([self._known(), *self._fingerprints()]),
                next="name the pool, or start one with `nnsight-hpc up`",
            )
        return max(serving, key=lambda pool: self._ready(pool.spec.name)).spec.name

    def replica(self, replica: str) -> Replica:
        """A replica that has not ended; raises `NotFound`."""
        found = self._replicas.get(replica)
        if found is None or found.state.ended:
            raise NotFound(f"there is no replica {replica}", why="it has ended" if found else "")
        return found

    def replicas(self, pool: str | None = None) -> list[Replica]:
        """Those that have not ended, the newest last."""
        return [r for r in self.of(pool) if not r.state.ended]

    def of(self, pool: str | None) -> list[Replica]:
        """All replicas that are remembered, also ended ones, the newest last."""
        return [r for r in self._replicas.values() if pool is None or r.spec.name == pool]

    def newest(self, pool: str) -> ReplicaStatus | None:
        return next((self._shown(replica) for replica in reversed(self.of(pool))), None)

    def is_leaving(self, replica: Replica) -> bool:
        """Whether it is to take nothing new: told to drain, ending by itself, or not what its pool is to be now."""
        pool = self._pools.get(replica.spec.name)
        stays = pool is not None and pool.desired > 0 and same_job(replica, pool)
        return replica.drain or replica.state == _R.DRAINING or not stays

    def status(self, name: str, queued: int = 0) -> PoolStatus:
        pool = self.get(name)
        ended = [r for r in self.of(name) if r.state.ended][-_SHOWN_ENDED:]
        shown = [self._shown(r) for r in self.of(name) if r in ended or not r.state.ended]
        return PoolStatus(
            spec=pool.spec,
            desired=pool.desired,
            replicas=tuple(shown),
            model=pool.model,
            queued=queued,
            held=pool.held,
        )

    # -- what people want ----------------------------------------------------------------------------------------

    async def put(self, spec: PoolSpec) -> None:
        """Create or change a pool; a held one is given another chance."""
        old = self._pools.get(spec.name)
        same_model = old is not None and _weights(old.spec) == _weights(spec)
        await self._save_pool(Pool(spec, spec.replicas, model=old.model if old and same_model else None))

    async def delete(self, name: str) -> None:
        """Want no replica of it any more; `forget` follows when they have ended."""
        await self._save_pool(msgspec.structs.replace(self.get(name), desired=0))

    async def forget(self, name: str) -> None:
        await self._drop([replica.id for replica in self.of(name)])
        await self._store.run(lambda c: c.execute("DELETE FROM pools WHERE name = ?", (name,)))
        del self._pools[name]
        self._changes.announce(f"pool:{name}")

    # -- what the reconciler and the workers know ------------------------------------------------------------------

    async def change_pool(self, name: str, **changes: Any) -> Pool:
        return await self._save_pool(msgspec.structs.replace(self.get(name), **changes))

    async def new_replica(self, spec: PoolSpec) -> Replica:
        """A replica that is about to be submitted; it is stored first, so that its worker is known when it dials."""
        return await self._add(f"{spec.name}-{secrets.token_hex(4)}", spec, job_id="")

    async def adopt(self, replica: str, spec: PoolSpec, job_id: str) -> Replica:
        """Take up a replica that this daemon has not submitted, and its pool where that is not known either."""
        if spec.name not in self._pools:
            await self.put(spec)
        return await self._add(replica, spec, job_id)

    async def change(
        self, replica: Replica, *, drain: bool | None = None, served: bool = False, cause: str = "", **status: Any
    ) -> Replica:
        """Change what is known of a replica; a state goes through the table of allowed moves."""
        old = replica.status
        if "state" in status:
            status["state"] = advance(old.state, status["state"], of=f"replica {replica.id}")
        changed = msgspec.structs.replace(old, **status)
        if (changed.state, changed.reason) != (old.state, old.reason):
            changed = msgspec.structs.replace(changed, changed=time.time())
        new = Replica(
            changed,
            replica.spec,
            drain=replica.drain if drain is None else drain,
            served=replica.served or served,
            cause=cause or replica.cause,
        )
        return await self._save_replica(new)

    async def _add(self, replica: str, spec: PoolSpec, job_id: str) -> Replica:
        now = time.time()
        status = ReplicaStatus(
            id=replica,
            pool=spec.name,
            state=_R.SUBMITTED,
            job_id=job_id,
            submitted=now,
            changed=now,
            log=str(self._places.replica(replica) / "log"),
        )
        await self._drop([r.id for r in self.of(spec.name) if r.state.ended][:-_KEPT_ENDED])
        return await self._save_replica(Replica(status, spec))

    async def _drop(self, replicas: list[str]) -> None:
        values = [(replica,) for replica in replicas]
        await self._store.run(lambda c: c.executemany("DELETE FROM replicas WHERE id = ?", values))
        for replica in replicas:
            del self._replicas[replica]

    async def _save_pool(self, pool: Pool) -> Pool:
        name = pool.spec.name
        self._pools[name] = pool
        await self._store.run(lambda c: c.execute("REPLACE INTO pools VALUES (?, ?)", (name, encode(pool))))
        self._changes.announce(f"pool:{name}")
        return pool

    async def _save_replica(self, replica: Replica) -> Replica:
        old = self._replicas.get(replica.id)
        self._replicas[replica.id] = replica
        if old is None or _worth_storing(old) != _worth_storing(replica):
            body = encode(replica)
            await self._store.run(lambda c: c.execute("REPLACE INTO replicas VALUES (?, ?)", (replica.id, body)))
        if old != replica:
            self._changes.announce(f"pool:{replica.spec.name}")
        return replica

    def _shown(self, replica: Replica) -> ReplicaStatus:
        """As people see it: one that is leaving drains, also before its worker or its job has been told."""
        if replica.state.ended or not self.is_leaving(replica):
            return replica.status
        return msgspec.structs.replace(replica.status, state=_R.DRAINING)

    def _ready(self, pool: str) -> int:
        return sum(r.state in (_R.READY, _R.BUSY) for r in self.of(pool))

    def _fingerprints(self) -> list[str]:
        known = [(name, self._pools[name].model) for name in self.names()]
        return [f"{name} holds {model.id}, fingerprint {model.fingerprint}" for name, model in known if model]

    def _known(self) -> str:
        names = sorted(self._pools)
        return f"the pools are {', '.join(names)}" if names else "there are no pools"


def check_spec(spec: PoolSpec, name: str) -> None:
    """Raise `InvalidInput` with all that is wrong with a spec; what Slurm allows, its executor checks."""
    check_name(name, of="pool")
    problems = [] if spec.name == name else [f"it is named {spec.name}, but was sent as {name}"]
    least = {"replicas": 1, "nodes": 1, "tasks_per_node": 1, "gpus_per_node": 0}
    for field, smallest in least.items():
        if (given := getattr(spec, field)) < smallest:
            problems.append(f"{field} is {given}, and must be at least {smallest}")
    if not spec.model:
        problems.append("it names no model")
    if problems:
        raise InvalidInput(f"pool {name} cannot be as it is described", why="\n".join(problems))


def same_job(replica: Replica, pool: Pool) -> bool:
    """Whether the replica is what a new one would be; how many there are to be makes no difference."""
    return msgspec.structs.replace(replica.spec, replicas=1) == msgspec.structs.replace(pool.spec, replicas=1)


def holds_model(replica: Replica, pool: Pool) -> bool:
    """Whether the replica was to hold the model that the pool is to hold now."""
    return _weights(replica.spec) == _weights(pool.spec)


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


def replica_failed(pool: Pool, replica: Replica, last_lines: str) -> ReplicaFailed:
    """Why a pool is held: how its last replica ended, and the end of its log."""
    lines = f"\nthe last lines of its log:\n{last_lines}" if last_lines else "\nit wrote nothing to its log"
    return ReplicaFailed(
        f"pool {pool.spec.name} is held: its replicas ended {pool.failures} times in a row before one could serve",
        where=f"replica {replica.id}, job {replica.status.job_id or '(none)'}, log {replica.status.log}",
        why=f"{replica.status.reason}{lines}",
        next=f"mend the cause, then `nnsight-hpc up {pool.spec.name} …` again",
    )


def _serves(pool: Pool, model: ModelIdentity) -> bool:
    """By the weights; by the model's name as long as the pool's weights are not known."""
    if pool.model is not None and model.fingerprint:
        return pool.model.fingerprint == model.fingerprint
    return bool(model.id) and model.id == pool.spec.model


def _weights(spec: PoolSpec) -> tuple[object, ...]:
    return spec.model, spec.revision, spec.dtype


def _worth_storing(replica: Replica) -> Replica:
    return msgspec.structs.replace(replica, status=msgspec.structs.replace(replica.status, loaded=0, total=0))


def _bodies(connection: sqlite3.Connection, table: str) -> list[tuple[str, bytes]]:
    return [tuple(row) for row in connection.execute(f"SELECT * FROM {table}")]  # noqa: S608 - a name of ours
