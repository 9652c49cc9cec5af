"""What waits for each pool, and how many run for it, in memory, so that whoever decides asks no disk."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from nnsight_hpc.daemon.queues import Queue, Waiting
from nnsight_hpc.daemon.table import waits
from nnsight_hpc.wire.states import RequestState

if TYPE_CHECKING:
    from nnsight_hpc.daemon.table import Row

HELD = (RequestState.LEASED, RequestState.RUNNING)


class Counts(NamedTuple):
    """How many requests wait for a pool and run for it."""

    queued: int
    running: int


@dataclass(frozen=True)
class Demand:
    """What is asked of a pool: how many requests wait and run, and since when the one waits that has waited longest."""

    queued: int = 0
    running: int = 0
    oldest: float | None = None


class Backlog:
    """All requests that have not ended; `note` hears of each change of a state."""

    def __init__(self) -> None:
        self._queues: dict[str, Queue] = defaultdict(Queue)
        self._held: dict[str, str] = {}
        self._running: Counter[str] = Counter()

    def note(self, row: Row) -> None:
        self._queues[row.pool].remove(row.id)
        self._not_held(row.id)
        if waits(row):
            self._queues[row.pool].add(Waiting.of(row))
        elif row.state in HELD:
            self._held[row.id] = row.pool
            self._running[row.pool] += 1

    def forget(self, request: str) -> None:
        """There is no such request."""
        for queue in self._queues.values():
            queue.remove(request)
        self._not_held(request)

    def _not_held(self, request: str) -> None:
        if pool := self._held.pop(request, None):
            self._running[pool] -= 1

    def take(self, one: Waiting) -> None:
        """It is being given to a worker, and nobody else is to choose it."""
        self._queues[one.pool].remove(one.id)

    def put_back(self, one: Waiting) -> None:
        """It could not be given."""
        self._queues[one.pool].add(one)

    def queue(self, pool: str) -> Queue:
        return self._queues[pool]

    def counts(self, pool: str) -> Counts:
        """How many wait and run, without a look at each of them."""
        return Counts(len(self._queues[pool]), self._running[pool])

    def demand(self, pool: str) -> Demand:
        """As `counts`, with a look at all that waits."""
        oldest = min((one.since for one in self._queues[pool].waiting()), default=None)
        return Demand(*self.counts(pool), oldest)

    def pools(self) -> list[str]:
        """Those for which something waits."""
        return [pool for pool, queue in self._queues.items() if len(queue)]

    def older(self, moment: float) -> list[str]:
        """The ids of what has waited since before `moment`."""
        return [one.id for queue in self._queues.values() for one in queue.waiting() if one.since < moment]
