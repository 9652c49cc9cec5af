"""Pools and their replicas: what is wanted, and what is known. The reconciler acts on it.

There are few of them, so they are kept in memory and written to the database at each change; what changes every few
seconds (how many bytes a worker has loaded, when it was last used or heard) is not written for its own sake.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec

from nnsight_hpc.daemon.records import (
    Pool,
    Replica,
    advance,
    measured,
    new_replica_id,
    primaries,
    wanted,
    weights,
)
from nnsight_hpc.daemon.roster import Roster
from nnsight_hpc.daemon.tidings import tidings
from nnsight_hpc.wire.messages import decode, encode
from nnsight_hpc.wire.pools import PoolSpec, ReplicaStatus
from nnsight_hpc.wire.states import ReplicaState

if TYPE_CHECKING:
    import sqlite3
    from typing import Any

    from nnsight_hpc.daemon.changes import Changes
    from nnsight_hpc.daemon.config import Config
    from nnsight_hpc.daemon.store import Store
    from nnsight_hpc.daemon.story import Stories

_R = ReplicaState
_KEPT_ENDED = 20


class Pools(Roster):
    """All pools and replicas of a daemon, in memory and in its database."""

    def __init__(self, store: Store, changes: Changes, config: Config, stories: Stories) -> None:
        super().__init__(config)
        self._store, self._changes, self._stories = store, changes, stories

    async def load(self) -> None:
        pools, replicas = await self._store.run(lambda c: (_bodies(c, "pools"), _bodies(c, "replicas")))
        self._pools = {name: decode(body, Pool) for name, body in pools}
        loaded = (decode(body, Replica) for _, body in replicas)
        self._replicas = {r.id: r for r in sorted(loaded, key=lambda r: r.status.submitted)}

    # -- what people want ----------------------------------------------------------------------------------------

    async def put(self, spec: PoolSpec) -> None:
        """Create or change a pool, with one replica at least, since somebody asked; a held one gets another chance."""
        old = self._pools.get(spec.name)
        before = old.desired if old and not old.down else 0
        desired = min(max(before, spec.least, 1), spec.most)
        pool = Pool(spec, desired, gpu_seconds=old.gpu_seconds if old else 0.0)
        if old is not None and weights(old.spec) == weights(spec):
            pool = msgspec.structs.replace(old, spec=spec, desired=desired, down=False, **_RESUMED)
        self.tell(spec.name, f"asked for: {spec.model}, replicas {spec.replicas}")
        await self._save_pool(pool)

    async def resume(self, name: str) -> None:
        """Start replicas again after their failures."""
        await self.change_pool(name, **_RESUMED)
        self.tell(name, "resumed")

    async def delete(self, name: str) -> None:
        """Want no replica of it any more; `forget` follows when they have ended."""
        if not self.get(name).down:
            self.tell(name, "taken down")
        await self.change_pool(name, down=True, desired=0)

    async def forget(self, name: str) -> None:
        await self._drop([replica.id for replica in self.of(name)])
        await self._store.run(lambda c: c.execute("DELETE FROM pools WHERE name = ?", (name,)))
        del self._pools[name]
        self._changes.announce(f"pool:{name}")

    # -- what the reconciler and the workers know ------------------------------------------------------------------

    def tell(self, pool: str, text: str, replica: str = "") -> None:
        """Add to the pool's story."""
        self._stories.tell(f"pool:{pool}", text, replica)

    def hear(self, replica: str) -> None:
        """The replica's worker has just said something."""
        self._heard[replica] = time.time()

    def hear_all(self) -> None:
        """Nobody was listened to for a while, so that it is not known which workers were silent."""
        self._heard.clear()
        self._listens = time.time()

    def use(self, replica: str) -> None:
        """The replica was just given a request, or has answered one."""
        if found := self._replicas.get(replica):
            self._replicas[replica] = msgspec.structs.replace(found, used=time.time())

    async def change_pool(self, name: str, **changes: Any) -> Pool:
        return await self._save_pool(msgspec.structs.replace(self.get(name), **changes))

    async def new_replica(self, spec: PoolSpec, *, succeeds: str = "", begin: float | None = None) -> Replica:
        """A replica that is about to be submitted; it is stored first, so that its worker is known when it dials."""
        return await self._add(new_replica_id(spec.name), spec, succeeds=succeeds, begin=begin)

    async def adopt(self, replica: str, spec: PoolSpec, job_id: str) -> Replica:
        """Take up a replica that this daemon has not submitted, and its pool where that is not known either.

        It counts as one more that is wanted, as far as the pool may have more: somebody has submitted it.
        """
        if spec.name not in self._pools:
            await self.put(spec)
        taken = await self._add(replica, spec, job_id=job_id)
        pool = self.get(spec.name)
        present = len(primaries(wanted(pool, self.of(spec.name))))
        if not pool.down and pool.desired < min(present, pool.spec.most):
            await self.change_pool(spec.name, desired=min(present, pool.spec.most))
        return taken

    async def change(self, replica: Replica, **changes: Any) -> Replica:
        """Change what is known of a replica: fields of `Replica`, or of its status; a state goes through the allowed moves.

        Raises `NotFound` when it has ended.
        """
        replica = self.replica(replica.id)  # as it is now: whoever asks may have waited for something
        now, old = time.time(), replica.status
        own = {name: changes.pop(name) for name in _OWN & changes.keys()}
        if "state" in changes:
            changes["state"] = advance(old.state, changes["state"], of=f"replica {replica.id}")
        status = msgspec.structs.replace(old, **changes)
        if (status.state, status.reason) != (old.state, old.reason):
            status = msgspec.structs.replace(status, changed=now)
        if status.state.serves and not replica.served:
            status = msgspec.structs.replace(status, ready=now, begins=None, position=None)
            own |= {"served": True, "used": self._used_before(replica) or now}
        new = msgspec.structs.replace(replica, status=status, **own)
        pool = self._pools.get(new.spec.name)
        learnt = measured(pool, replica, new, now=now, listens=self._listens) if pool else {}
        if pool and learnt:  # at once, so that nobody sees one without the other
            self._pools[new.spec.name] = msgspec.structs.replace(pool, **learnt)
        await self._save_replica(new)
        if learnt:
            await self.change_pool(new.spec.name)
        return new

    # -- inside --------------------------------------------------------------------------------------------------

    async def _add(
        self, replica: str, spec: PoolSpec, *, job_id: str = "", succeeds: str = "", begin: float | None = None
    ) -> Replica:
        now = time.time()
        status = ReplicaStatus(
            id=replica,
            pool=spec.name,
            state=_R.SUBMITTED,
            job_id=job_id,
            submitted=now,
            changed=now,
            begins=begin,
            succeeds=succeeds,
            log=str(self._config.places.replica(replica) / "log"),
        )
        await self._drop([r.id for r in self.of(spec.name) if r.state.ended][:-_KEPT_ENDED])
        return await self._save_replica(Replica(status, spec, begin=begin))

    def _used_before(self, replica: Replica) -> float:
        """When the one whose place it takes was last used: nobody is less idle for having been replaced."""
        predecessor = self._replicas.get(replica.status.succeeds)
        return predecessor.used if predecessor else 0.0

    async def _drop(self, replicas: list[str]) -> None:
        values = [(replica,) for replica in replicas]
        await self._store.run(lambda c: c.executemany("DELETE FROM replicas WHERE id = ?", values))
        for replica in replicas:
            self._heard.pop(replica, None)
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
        if text := tidings(old, replica):
            self.tell(replica.spec.name, text, replica.id)
        if old is None or _worth_storing(old) != _worth_storing(replica):
            body = encode(replica)
            await self._store.run(lambda c: c.execute("REPLACE INTO replicas VALUES (?, ?)", (replica.id, body)))
        if old != replica:
            self._changes.announce(f"pool:{replica.spec.name}")
        if replica.leaves and not (old and old.leaves):  # its worker waits for requests and for orders
            self._changes.announce(f"queue:{replica.spec.name}")
            self._changes.announce(f"orders:{replica.id}")
        return replica


_OWN = frozenset(Replica.__struct_fields__) - {"status", "spec"}
_RESUMED: dict[str, Any] = {"held": None, "failures": 0, "gap": ""}


def _worth_storing(replica: Replica) -> Replica:
    return msgspec.structs.replace(replica, used=0.0, status=msgspec.structs.replace(replica.status, loaded=0, total=0))


def _bodies(connection: sqlite3.Connection, table: str) -> list[tuple[str, bytes]]:
    return [tuple(row) for row in connection.execute(f"SELECT * FROM {table}")]  # noqa: S608 - a name of ours
