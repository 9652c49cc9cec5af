"""What waits for each pool, and how many run for it, in memory, so that whoever decides asks no disk."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nnsight_hpc.daemon.queues import Queue
from nnsight_hpc.daemon.table import waits
from nnsight_hpc.daemon.turns import Waiting
from nnsight_hpc.wire.states import RequestState

if TYPE_CHECKING:
    from nnsight_hpc.daemon.table import Row

HELD = (RequestState.LEASED, RequestState.RUNNING)


@dataclass(frozen=True)
class Demand:
    """What is asked of a pool: how many requests wait and run, and since when the one waits that has waited longest."""

    queued: int = 0
    running: int = 0
    oldest: float | None = None


class Backlog:
    """All requests that have not ended; `note` hears of each change of a state.

    Attributes
    ----------
    users
        How many wait of each user.
    """

    def __init__(self) -> None:
        self._queues: dict[str, Queue] = defaultdict(Queue)
        self._held: dict[str, str] = {}
        self._running: Counter[str] = Counter()
        self.users: Counter[str] = Counter()

    def note(self, row: Row) -> None:
        self._not_held(row.id)
        if waits(row):
            self.put_back(Waiting.of(row))
            return
        self._remove(row.id, row.pool)
        if row.state in HELD:
            self._held[row.id] = row.pool
            self._running[row.pool] += 1

    def forget(self, request: str) -> None:
        """There is no such request."""
        for pool in self._queues:
            self._remove(request, pool)
        self._not_held(request)

    def _not_held(self, request: str) -> None:
        if pool := self._held.pop(request, None):
            self._running[pool] -= 1

    def _remove(self, request: str, pool: str) -> None:
        if one := self._queues[pool].remove(request):
            self.users[one.user] -= 1

    def take(self, one: Waiting) -> None:
        """It is being given to a worker, and nobody else is to choose it."""
        self._remove(one.id, one.pool)

    def put_back(self, one: Waiting) -> None:
        """It may be chosen (again)."""
        self._remove(one.id, one.pool)
        self._queues[one.pool].add(one)
        self.users[one.user] += 1

    def queue(self, pool: str) -> Queue:
        return self._queues[pool]

    def demand(self, pool: str) -> Demand:
        """What is asked of a pool just now."""
        queue = self._queues[pool]
        return Demand(len(queue), self._running[pool], queue.oldest)

    def pools(self) -> list[str]:
        """Those for which something waits."""
        return [pool for pool, queue in self._queues.items() if len(queue)]

    def older(self, moment: float) -> list[str]:
        """The ids of what has waited since before `moment`."""
        return [request for queue in self._queues.values() for request in queue.older(moment)]
