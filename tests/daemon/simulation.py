"""A cluster in which time is a number: jobs wait, load, serve and end, and what is decided is carried out at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from nnsight_hpc.daemon.backlog import Demand
from nnsight_hpc.daemon.records import advance, measured, primaries, wanted
from nnsight_hpc.daemon.steps import Cancel, Release, Submit
from nnsight_hpc.wire.states import EndCause, ReplicaState
from tests.daemon.known import NOW, decided, replica

if TYPE_CHECKING:
    from collections.abc import Callable

    from nnsight_hpc.daemon.records import Pool, Replica

_R = ReplicaState


class Simulation:
    """One pool. The first job loads for `load` seconds, later ones `growth` times as long; each waits `wait` in the queue.

    What only Slurm knows (when a job began, when its walltime ends) is learnt every `poll` seconds.
    """

    def __init__(self, pool: Pool, *, load: float, wait: float, growth: float, poll: float, step: float) -> None:
        self.pool, self.now = pool, NOW
        self._load, self._wait, self._growth, self._poll, self._step = load, wait, growth, poll, step
        self._replicas: dict[str, Replica] = {}
        self._starts: dict[str, float] = {}
        self._looked = NOW
        self.demand = Demand()
        self.most_jobs = self.most_extra = 0

    def serving(self) -> list[Replica]:
        return [one for one in self._replicas.values() if one.serves]

    def crash(self) -> None:
        """The job that was submitted first ends by itself."""
        if self._replicas:
            self._end(next(iter(self._replicas)), EndCause.CRASHED)

    def run(self, *, until: Callable[[], Any], seconds: float) -> int:
        """Go on until something is so, or for so long; the smallest number of replicas that served meanwhile."""
        end, fewest = self.now + seconds, 1 << 30
        while self.now < end and not until():
            self.now += self._step
            self._pass()
            self._decide()
            fewest = min(fewest, len(self.serving()))
            self._count()
        return fewest

    def _count(self) -> None:
        """How many jobs there were at most, and how many more were wanted than the pool is to have, successors aside."""
        self.most_jobs = max(self.most_jobs, len(self._replicas))
        present = primaries(wanted(self.pool, self._replicas.values()))
        self.most_extra = max(self.most_extra, len(present) - self.pool.desired)

    def _pass(self) -> None:
        looks = self.now - self._looked >= self._poll
        self._looked = self.now if looks else self._looked
        for name, start in self._starts.items():
            if name in self._replicas and self.now >= start:
                self._go_on(name, start, looks=looks)

    def _go_on(self, name: str, start: float, *, looks: bool) -> None:
        load = self._load * (self._growth if self._replicas[name].status.succeeds else 1)
        end = start + self.pool.walltime
        if looks:
            self._change(name, started=start, ends=end)
        if self.now >= end:
            self._end(name, EndCause.WALLTIME)
        elif self.now >= end - self.pool.farewell:
            self._change(name, state=_R.DRAINING)
            self._end(name, EndCause.DRAINED)
        elif self.now >= start + load:
            self._serve(name)
        else:
            self._change(name, state=_R.LOADING)

    def _serve(self, name: str) -> None:
        if self._replicas[name].leaves:
            self._end(name, EndCause.DRAINED)
        elif not self._replicas[name].served:
            self._change(name, state=_R.READY, ready=self.now, served=True, used=self.now)
        elif self.demand.queued:
            self._change(name, used=self.now)

    def _decide(self) -> None:
        decision = decided(self.pool, *self._replicas.values(), demand=self.demand, now=self.now)
        self.pool = msgspec.structs.replace(self.pool, desired=decision.desired)
        for step in decision.steps:
            match step:
                case Submit():
                    self._submit(step)
                case Release(replica=one) if one.served:
                    self._change(one.id, state=_R.DRAINING, drain=True)
                case Release(replica=one) | Cancel(replica=one):
                    self._end(one.id, EndCause.DRAINED)

    def _submit(self, step: Submit) -> None:
        name = f"r{len(self._starts)}"
        begin = {
            "begin": step.begin,
            "submitted": self.now,
            "changed": self.now,
            "used": 0.0,
            "succeeds": step.succeeds,
        }
        self._replicas[name] = replica(name, _R.PENDING, of=self.pool, **begin)
        self._starts[name] = max(self.now, step.begin or 0.0) + self._wait

    def _change(self, name: str, **changes: Any) -> None:
        old = self._replicas[name]
        own = {key: changes.pop(key) for key in ("served", "drain", "used") if key in changes}
        if "state" in changes:
            changes["state"] = advance(old.state, changes["state"], of=name)
        status = msgspec.structs.replace(old.status, **changes)
        new = self._replicas[name] = msgspec.structs.replace(old, status=status, **own)
        self.pool = msgspec.structs.replace(self.pool, **measured(self.pool, old, new, now=self.now, listens=NOW))

    def _end(self, name: str, cause: EndCause) -> None:
        self._change(name, state=_R.ENDED, cause=cause)
        del self._replicas[name]
