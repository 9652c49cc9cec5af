"""The requests that wait for one pool, in memory: each user's in his own order, and all users' in the fair one.

The fair order gives each user a clock, which stands at what he has had (`Order.cost`) and goes on by what a request is
taken to cost (`Order.step`) with each of his that goes; whose clock is least goes next. So what is decided next costs as
much as there are users, however many requests wait.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections import Counter
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from nnsight_hpc.daemon.table import Row


class Waiting(NamedTuple):
    """What is to be known of a queued request to choose it; they sort as in their user's own queue."""

    behind: int  # minus its priority
    sequence: int
    id: str
    pool: str
    user: str
    kind: str
    since: float
    needs: float
    batch: str
    tokens: int

    @classmethod
    def of(cls, row: Row) -> Waiting:
        since = row.times[row.state]
        return cls(
            -row.priority, row.sequence, row.id, row.pool, row.user, row.kind, since, row.needs, row.batch, row.tokens
        )


class Order(NamedTuple):
    """What each user has had, and what one more request is taken to cost, in seconds; above 0.

    Nothing of the users in `barred` may go just now.
    """

    cost: Mapping[str, float]
    step: float
    barred: frozenset[str] = frozenset()


class Line:
    """Requests of which any may go next."""

    def __init__(self) -> None:
        self._users: dict[str, list[Waiting]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._users.values()))

    def users(self) -> list[str]:
        return list(self._users)

    def of(self, user: str) -> list[Waiting]:
        """A user's, as they would go."""
        return self._users.get(user, [])

    def counts(self) -> Counter[str]:
        """How many there are of each user."""
        return Counter({user: len(mine) for user, mine in self._users.items()})

    def add(self, one: Waiting) -> None:
        insort(self._users.setdefault(one.user, []), one)

    def remove(self, one: Waiting) -> None:
        mine = self._users[one.user]
        del mine[bisect_left(mine, one)]
        if not mine:
            del self._users[one.user]

    def in_order(self, order: Order, fits: Callable[[Waiting], bool] = lambda _: True) -> Iterator[Waiting]:
        """Those that fit, as they would go; the line must not change in between."""
        queues = {user: enumerate(filter(fits, mine)) for user, mine in self._users.items() if user not in order.barred}
        firsts = ((order.cost[user], next(queue, None)) for user, queue in queues.items())
        heap = [(cost, found[1].sequence, found[1]) for cost, found in firsts if found]
        heapq.heapify(heap)
        while heap:
            one = heap[0][2]
            yield one
            if found := next(queues[one.user], None):
                number, following = found
                heapq.heapreplace(heap, (_due(order, one.user, number), following.sequence, following))
            else:
                heapq.heappop(heap)

    def before(self, one: Waiting, order: Order) -> int:
        """How many would go before a request of this line."""
        goal = _due(order, one.user, bisect_left(self._users[one.user], one)), one.sequence
        return sum(_earlier(theirs, goal, order.cost[user], order.step) for user, theirs in self._users.items())


def _earlier(theirs: list[Waiting], goal: tuple[float, int], cost: float, step: float) -> int:
    """How many of a user's go before what is due at `goal`: calculated, then mended by what rounding and ties do."""
    count = min(max(0, int((goal[0] - cost) / step)), len(theirs))
    while count < len(theirs) and (cost + count * step, theirs[count].sequence) < goal:
        count += 1
    while count and (cost + (count - 1) * step, theirs[count - 1].sequence) >= goal:
        count -= 1
    return count


def _due(order: Order, user: str, number: int) -> float:
    return order.cost[user] + number * order.step


class Queue:
    """All that waits for one pool: runs, of which those with the same `batch` may go together, and dumps."""

    def __init__(self) -> None:
        self.runs, self.dumps = Line(), Line()
        self._batches: dict[str, Line] = {}
        self._known: dict[str, tuple[Waiting, list[Line]]] = {}

    def __len__(self) -> int:
        return len(self._known)

    @property
    def lines(self) -> tuple[Line, Line]:
        """What goes first, and what goes then."""
        return self.runs, self.dumps

    def add(self, one: Waiting) -> None:
        """One that is here already takes its new place."""
        self.remove(one.id)
        lines = [self.dumps if one.kind == "dump" else self.runs]
        if one.batch:
            lines.append(self._batches.setdefault(one.batch, Line()))
        for line in lines:
            line.add(one)
        self._known[one.id] = one, lines

    def remove(self, request: str) -> None:
        """Nothing happens where it does not wait here."""
        if request not in self._known:
            return
        one, lines = self._known.pop(request)
        for line in lines:
            line.remove(one)
        if one.batch and not self._batches[one.batch].users():
            del self._batches[one.batch]

    def find(self, request: str) -> Waiting | None:
        return self._known[request][0] if request in self._known else None

    def users(self) -> set[str]:
        return {*self.runs.users(), *self.dumps.users()}

    def of(self, user: str) -> Iterator[Waiting]:
        """A user's, as they would go."""
        return chain(self.runs.of(user), self.dumps.of(user))

    def counts(self) -> Counter[str]:
        """How many wait of each user."""
        return self.runs.counts() + self.dumps.counts()

    def waiting(self) -> Iterator[Waiting]:
        return (one for one, _ in self._known.values())

    def companions(self, one: Waiting, order: Order, fits: Callable[[Waiting], bool]) -> Iterator[Waiting]:
        """Those that may share a forward with a run, in the fair order."""
        return (other for other in self._batches[one.batch].in_order(order, fits) if other != one)

    def sharing(self, one: Waiting) -> int:
        """How many may share a forward with a run, itself among them."""
        return len(self._batches[one.batch])

    def before(self, one: Waiting, order: Order) -> int:
        """How many would go before a request as things stand; before a dump go all runs."""
        line = self._known[one.id][1][0]
        return line.before(one, order) + (len(self.runs) if line is self.dumps else 0)
