"""Whose turn is next: requests of which any may go, each user's in his own order, and all users' in the fair one.

The fair order gives each user a clock, which stands at what he has had (`Order.cost`) and goes on by what a request is
taken to cost (`Order.step`) with each of his that goes; whose clock is least goes next. Users stand sorted by what they
have had. All of that is forgotten at the same rate, so they stay in their order until one has more; he takes his new place
when he is next looked at. So a choice costs neither with the requests that wait nor with the users who do: it looks at
those who have had least, at those of whom something runs, and at each different need once.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field
from heapq import heappop, heappush, heapreplace, merge
from math import inf
from typing import TYPE_CHECKING, NamedTuple

from nnsight_hpc.daemon.shares import Usage

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from nnsight_hpc.daemon.table import Row

_NOTHING = Usage()


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


@dataclass(frozen=True)
class Order:
    """What each user has had by `now`, and what one more request is taken to cost (`step`, in seconds; above 0).

    `running` is what those of a user have cost so far that run. Nothing of the users in `barred` may go just now.
    """

    usage: Mapping[str, Usage]
    running: Mapping[str, float]
    now: float
    half_life: float
    step: float
    barred: frozenset[str] = frozenset()
    _costs: dict[str, float] = field(default_factory=dict, init=False)

    def rank(self, user: str) -> float:
        """Users sort by it as by what they `had`, and it stays as it is while they have no more."""
        return self.usage.get(user, _NOTHING).rank(self.half_life)

    def had(self, user: str) -> float:
        """Seconds, without what runs."""
        return self.usage.get(user, _NOTHING).at(self.now, self.half_life)

    def cost(self, user: str) -> float:
        """Seconds, with what runs."""
        if user not in self._costs:
            self._costs[user] = self.had(user) + self.running.get(user, 0.0)
        return self._costs[user]

    def due(self, user: str, number: int) -> float:
        """Where a user's clock stands when so many of his have gone."""
        return self.cost(user) + number * self.step


class Line:
    """Requests of which any may go next."""

    def __init__(self) -> None:
        self._lanes: dict[float, _Lane] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, one: Waiting) -> None:
        self._lanes.setdefault(one.needs, _Lane()).add(one)
        self._count += 1

    def remove(self, one: Waiting) -> None:
        lane = self._lanes[one.needs]
        lane.remove(one)
        self._count -= 1
        if not lane.users:
            del self._lanes[one.needs]

    def first(self, order: Order, within: float) -> Waiting | None:
        """The one that goes next of those that need so many seconds at most."""
        return next(self.in_order(order, within), None)

    def in_order(self, order: Order, within: float = inf) -> Iterator[Waiting]:
        """Those that need so many seconds at most, as they would go; the line must not change in between."""
        lanes = [lane for needs, lane in self._lanes.items() if needs <= within]
        going: list[_Going] = []  # a heap
        seen = set(order.barred)
        for had, sequence, user in merge(*(lane.ranked(order) for lane in lanes)):
            yield from _due_before(going, (had, sequence), order)
            if user not in seen:
                seen.add(user)
                mine = merge(*(lane.users[user] for lane in lanes if user in lane.users))
                one = next(mine)
                heappush(going, _Going(order.cost(user), one.sequence, one, 0, mine))
        yield from _due_before(going, (inf, 0), order)


class _Going(NamedTuple):
    """A user's next request: when it is due, how many of his went before it, and those that follow."""

    due: float
    sequence: int
    one: Waiting
    number: int
    others: Iterator[Waiting]


def _due_before(going: list[_Going], limit: tuple[float, int], order: Order) -> Iterator[Waiting]:
    """What goes before anything of a user who comes at this time, with this request."""
    while going and going[0][:2] < limit:
        _, _, one, number, others = going[0]
        yield one
        if following := next(others, None):
            due = order.due(one.user, number + 1)
            heapreplace(going, _Going(due, following.sequence, following, number + 1, others))
        else:
            heappop(going)


class _Lane:
    """The requests of a line that need the same time; `users` has each user's, as they would go."""

    def __init__(self) -> None:
        self.users: dict[str, list[Waiting]] = {}
        self._ranks: dict[str, float] = {}  # as they were when he was last looked at, or less
        self._ranked: list[tuple[float, int, str]] = []  # rank, sequence of his first request, user

    def add(self, one: Waiting) -> None:
        mine = self.users.setdefault(one.user, [])
        before = mine[0] if mine else None
        insort(mine, one)
        self._follow(one.user, before)

    def remove(self, one: Waiting) -> None:
        mine = self.users[one.user]
        before = mine[0]
        del mine[bisect_left(mine, one)]
        self._follow(one.user, before)

    def ranked(self, order: Order) -> Iterator[tuple[float, int, str]]:
        """Who waits, and first who has had least: seconds, the sequence of his first request, and his name."""
        place = 0
        while place < len(self._ranked):
            known, sequence, user = self._ranked[place]
            if known < (rank := order.rank(user)):
                del self._ranked[place]
                self._place(rank, sequence, user)
            else:
                yield order.had(user), sequence, user
                place += 1

    def _follow(self, user: str, before: Waiting | None) -> None:
        """His first request was `before`, and may be another one now."""
        mine = self.users[user]
        if mine and mine[0] is before:
            return
        rank = self._ranks.pop(user, -inf)
        if before is not None:
            del self._ranked[bisect_left(self._ranked, (rank, before.sequence, user))]
        if mine:
            self._place(rank, mine[0].sequence, user)
        else:
            del self.users[user]

    def _place(self, rank: float, sequence: int, user: str) -> None:
        self._ranks[user] = rank
        insort(self._ranked, (rank, sequence, user))
