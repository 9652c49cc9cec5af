"""All pools and replicas that are known, in memory, and what can be said of them. `pools.Pools` changes it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec

from nnsight_hpc.daemon.notes import note
from nnsight_hpc.daemon.records import SPARE, Pool, Replica, left, wanted
from nnsight_hpc.wire.errors import HpcError, NotFound, from_report
from nnsight_hpc.wire.pools import PoolStatus, ReplicaStatus
from nnsight_hpc.wire.states import ReplicaState

if TYPE_CHECKING:
    from nnsight_hpc.daemon.config import Config
    from nnsight_hpc.wire.messages import ModelIdentity

_SHOWN_ENDED = 3


class Roster:
    """What there is. `trouble` says why the batch system could not be asked lately, if so."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._pools: dict[str, Pool] = {}
        self._replicas: dict[str, Replica] = {}
        self._heard: dict[str, float] = {}
        self._listens = time.time()
        self.trouble = ""

    def all(self) -> list[Pool]:
        return list(self._pools.values())

    def names(self) -> list[str]:
        return sorted(self._pools)

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
        if pool is None or pool.down:
            return NotFound(
                f"pool {name} was taken down",
                next=f"start it again with `nnsight-hpc up {name} --model …`, and send the request again",
            )
        hope = any(not replica.leaves for replica in self.replicas(name))
        return from_report(pool.held) if pool.held and not hope else None

    def for_model(self, model: ModelIdentity) -> str:
        """The name of the pool that serves a graph's model; of several the one with most replicas that are ready."""
        serving = [pool for pool in self._pools.values() if not pool.down and _is_of(pool, model)]
        if not serving:
            raise NotFound(
                f"no pool serves the model {model.id or '(not named)'}, fingerprint {model.fingerprint or '(none)'}",
                why="\n".join([self._known(), *self._fingerprints()]),
                next="name the pool, or start one with `nnsight-hpc up`",
            )
        return max(serving, key=lambda pool: len(self._serving(pool.spec.name))).spec.name

    def replica(self, replica: str) -> Replica:
        """A replica that has not ended; raises `NotFound`."""
        found = self._replicas.get(replica)
        if found is None or found.state.ended:
            raise NotFound(f"there is no replica {replica}", why="it has ended" if found else "")
        return found

    def remembered(self, replica: str) -> Replica | None:
        """A replica, also one that has ended, as long as it is remembered."""
        return self._replicas.get(replica)

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
        return pool is None or not wanted(pool, [replica])

    def left(self, replica: str) -> float:
        """Seconds until the replica's walltime ends; infinite where there is none, or none is known (any more)."""
        found = self._replicas.get(replica)
        return left(found) if found else float("inf")

    def longest(self, name: str) -> float:
        """How many seconds a request may take at most on a replica that has just become ready."""
        pool = self.find(name)
        if pool is None or self._config.executor == "embedded":
            return float("inf")
        return max(0.0, pool.walltime - (pool.load_seconds or 0.0) - SPARE)

    def note(self, name: str) -> str:
        """What the pool waits for, in words; empty when it serves and nothing is to be said."""
        return note(self.get(name), self.of(name), self.trouble, time.time())

    def heard(self, replica: str) -> float:
        """When the replica's worker was last heard, or this daemon began to listen."""
        return self._heard.get(replica, self._listens)

    def status(self, name: str, queued: int = 0) -> PoolStatus:
        pool, now = self.get(name), time.time()
        ended = [r for r in self.of(name) if r.state.ended][-_SHOWN_ENDED:]
        shown = [self._shown(r) for r in self.of(name) if r in ended or not r.state.ended]
        return PoolStatus(
            spec=pool.spec,
            desired=pool.desired,
            down=pool.down,
            replicas=tuple(shown),
            model=pool.model,
            queued=queued,
            held=pool.held,
            gpu_seconds=pool.gpu_seconds + sum(r.gpu_seconds(now) for r in self.replicas(name)),
            note=self.note(name),
        )

    # -- inside --------------------------------------------------------------------------------------------------

    def _shown(self, replica: Replica) -> ReplicaStatus:
        """As people see it: one that is leaving drains, also before its worker or its job has been told."""
        if replica.state.ended or not self.is_leaving(replica):
            return replica.status
        return msgspec.structs.replace(replica.status, state=ReplicaState.DRAINING)

    def _serving(self, pool: str) -> list[Replica]:
        return [replica for replica in self.replicas(pool) if replica.serves and not self.is_leaving(replica)]

    def _fingerprints(self) -> list[str]:
        known = [(name, self._pools[name].model) for name in self.names()]
        return [f"{name} holds {model.id}, fingerprint {model.fingerprint}" for name, model in known if model]

    def _known(self) -> str:
        names = sorted(self._pools)
        return f"the pools are {', '.join(names)}" if names else "there are no pools"


def _is_of(pool: Pool, model: ModelIdentity) -> bool:
    """By the weights; by the model's name as long as the pool's weights are not known."""
    if pool.model is not None and model.fingerprint:
        return pool.model.fingerprint == model.fingerprint
    return bool(model.id) and model.id == pool.spec.model
