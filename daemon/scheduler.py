"""Which request goes next, from what is known in memory: the least of what users have had goes first.

A run that waits goes before dumps, and a dump that runs gives way to it. Where the dump's user has had less than the run's,
both take turns (`Config.turn`), so that neither starves the other.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from dataclasses import replace
from heapq import merge
from itertools import islice
from math import ceil
from typing import TYPE_CHECKING, NamedTuple

from nnsight_hpc.daemon.records import SPARE
from nnsight_hpc.daemon.turns import Order

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

    from nnsight_hpc.daemon.backlog import Backlog
    from nnsight_hpc.daemon.config import Config
    from nnsight_hpc.daemon.holdings import Held, Holdings
    from nnsight_hpc.daemon.records import Replica
    from nnsight_hpc.daemon.roster import Roster
    from nnsight_hpc.daemon.shares import Usage
    from nnsight_hpc.daemon.turns import Waiting

_FIRST_PACE, _LEAST_PACE = 1.0, 0.001
_NEWEST = 0.1
"""How much the newest request counts in the mean of a pool."""


class Pace(NamedTuple):
    """How many replicas of a pool serve, how many of them are free, and the seconds that a request took lately, if known."""

    serving: int
    free: int
    seconds: float | None

    def starts(self, position: int) -> float | None:
        """When a request with so many before it may start, if all goes as lately; None where that is not known."""
        ahead = max(0, position + 1 - self.free)
        if not self.serving or (ahead and self.seconds is None):
            return None
        return time.time() + ahead * (self.seconds or 0.0) / self.serving


class Scheduler:
    """Decides; `requests` makes it so.

    Attributes
    ----------
    usage
        What each user has had, by name.
    """

    def __init__(self, backlog: Backlog, holdings: Holdings, roster: Roster, config: Config) -> None:
        self._backlog, self._holdings, self._roster, self._config = backlog, holdings, roster, config
        self.usage: dict[str, Usage] = {}
        self._paces: dict[str, float] = {}

    def ran(self, pool: str, seconds: float) -> None:
        """A run of the pool has cost so much."""
        pace = self._paces.get(pool, seconds)
        self._paces[pool] = pace + _NEWEST * (seconds - pace)

    def next(self, pool: str, replica: str, most: int, tokens: float) -> list[Waiting]:
        """What the replica is to be given, if anything: several of one batch where they have so many tokens at most."""
        queue, order, left = self._backlog.queue(pool), self._order(pool), self._left(replica)
        run, dump = queue.runs.first(order, left), queue.dumps.first(order, left)
        if dump is not None and (run is None or self._is_owed(dump, run, order)):
            return [dump]
        if run is None:
            return []
        if not run.batch:
            return [run]
        others = queue.companions(run, order, left)
        most = min(most, ceil(queue.sharing(run) / max(1, self.pace(pool).free)))  # free replicas share a batch, too
        return [run, *_while_room(islice(others, most - 1), tokens - run.tokens)]

    def gives_way(self, replica: str) -> tuple[str, ...]:
        """The dump, or the part of one, that the replica is to interrupt, if so.

        One that is paused; otherwise one at a time, where something waits that no replica is free for: parts first.
        """
        mine = [held for held in self._holdings.all() if held.replica == replica and held.is_dump]
        if not mine or any(held.pause for held in mine):
            return tuple(held.id for held in mine)
        pool = mine[0].pool
        queue, order = self._backlog.queue(pool), self._order(pool)
        left = {one.id: self._left(one.id) for one in self._serving(pool)}
        first = queue.first(order, max(left.values(), default=0.0))
        if first is None:
            return ()
        able = {one for one, seconds in left.items() if first.needs <= seconds}
        dumps = [held for held in self._holdings.all() if held.pool == pool and held.is_dump]
        giving = [dump for dump in dumps if dump.replica in able and self._yields(dump, first, order)]
        if not giving or able - {held.replica for held in self._holdings.all()}:
            return ()
        chosen = max(giving, key=lambda dump: (dump.kind == "part", order.cost(dump.user), dump.id))
        return (chosen.id,) if chosen.replica == replica else ()

    def dues(self, pool: str, replicas: Mapping[str, int]) -> dict[str, float]:
        """What users have had, with a turn for each of so many replicas: the next replica is for whom it is least.

        The turns share out replicas that are free at the same time, when what they will cost is not known yet.
        """
        order = self._order(pool)
        return {user: order.cost(user) + count * self._config.turn for user, count in replicas.items()}

    def is_barred(self, user: str) -> bool:
        """Whether he has as many replicas at work as he may have."""
        return self._replicas_of()[user] >= self._config.running_per_user

    # -- what people see -----------------------------------------------------------------------------------------

    def position(self, pool: str, request: str) -> int | None:
        """How many would go before it as things stand; None where it does not wait."""
        queue = self._backlog.queue(pool)
        one = queue.find(request)
        return None if one is None else queue.before(one, self._order(pool))

    def positions(self, pool: str, requests: Collection[str]) -> dict[str, int]:
        """Those of these that wait for the pool."""
        queue, order = self._backlog.queue(pool), self._order(pool)
        return {one.id: queue.before(one, order) for one in map(queue.find, requests) if one is not None}

    def coming(self, user: str | None, most: int) -> dict[str, int]:
        """What goes next of all pools, of one user or of all: so many at most, those with the least positions, and these."""
        pools = self._backlog.pools()
        places = [self._places(pool) if user is None else self._places_of(user, pool) for pool in pools]
        return {one.id: number for number, one in islice(merge(*places), most)}

    def waiting(self) -> Counter[str]:
        """How many requests wait of each user, for all pools."""
        return +self._backlog.users

    def pace(self, pool: str) -> Pace:
        """From which it follows when what waits for the pool may start."""
        serving, busy = self._serving(pool), {held.replica for held in self._holdings.all()}
        return Pace(len(serving), sum(one.id not in busy for one in serving), self._paces.get(pool))

    # -- inside --------------------------------------------------------------------------------------------------

    def _order(self, pool: str) -> Order:
        """What runs counts with what it has run so far, or is to run as far as known."""
        now, step = time.time(), max(_LEAST_PACE, self._paces.get(pool, _FIRST_PACE))
        running: dict[str, float] = defaultdict(float)
        for held in self._holdings.all():
            running[held.user] += held.share * max(step, now - held.since)
        most = self._config.running_per_user
        barred = frozenset(user for user, count in self._replicas_of().items() if count >= most)
        return Order(self.usage, running, now, self._config.half_life, step, barred)

    def _places(self, pool: str) -> Iterator[tuple[int, Waiting]]:
        """All that waits for a pool, with its position: as it would go if nobody were barred."""
        order = replace(self._order(pool), barred=frozenset())
        return enumerate(self._backlog.queue(pool).in_order(order))

    def _places_of(self, user: str, pool: str) -> Iterator[tuple[int, Waiting]]:
        """As `_places`, of one user: at a cost that does not grow with what others have there."""
        queue, order = self._backlog.queue(pool), self._order(pool)
        return ((queue.before(one, order), one) for one in queue.of(user))

    def _replicas_of(self) -> Counter[str]:
        """On how many replicas something runs of each user."""
        return Counter(user for user, _ in {(held.user, held.replica) for held in self._holdings.all()})

    def _is_owed(self, dump: Waiting, run: Waiting, order: Order) -> bool:
        """Whether a dump that waits goes before a run."""
        return order.cost(dump.user) < order.cost(run.user) and self._had_a_turn(dump.since)

    def _yields(self, dump: Held, one: Waiting, order: Order) -> bool:
        """Whether a dump gives way to what waits: a part of one always, another one to runs only."""
        if dump.kind == "part" or one.kind == "dump":
            return dump.kind == "part"
        return order.cost(one.user) <= order.cost(dump.user) or self._had_a_turn(dump.since)

    def _had_a_turn(self, since: float) -> bool:
        return time.time() - since >= self._config.turn

    def _serving(self, pool: str) -> list[Replica]:
        return [one for one in self._roster.replicas(pool) if one.serves and not self._roster.is_leaving(one)]

    def _left(self, replica: str) -> float:
        return self._roster.left(replica) - SPARE


def _while_room(others: Iterable[Waiting], tokens: float) -> Iterator[Waiting]:
    """Up to the first for which there is no room."""
    for one in others:
        tokens -= one.tokens
        if tokens < 0:
            return
        yield one
