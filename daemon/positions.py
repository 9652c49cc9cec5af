"""How many go before a request in the fair order: calculated from how many each user has waiting, whatever their number."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nnsight_hpc.daemon.turns import Order, Waiting


class Positions:
    """Requests of which any may go next, each user's in his own order."""

    def __init__(self) -> None:
        self._users: dict[str, list[Waiting]] = {}

    def of(self, user: str) -> list[Waiting]:
        """A user's, as they would go."""
        return self._users.get(user, [])

    def add(self, one: Waiting) -> None:
        insort(self._users.setdefault(one.user, []), one)

    def remove(self, one: Waiting) -> None:
        mine = self._users[one.user]
        del mine[bisect_left(mine, one)]
        if not mine:
            del self._users[one.user]

    def before(self, one: Waiting, order: Order) -> int:
        """How many would go before one of these."""
        goal = order.due(one.user, bisect_left(self._users[one.user], one)), one.sequence
        return sum(_earlier(theirs, goal, order.cost(user), order.step) for user, theirs in self._users.items())


def _earlier(theirs: list[Waiting], goal: tuple[float, int], cost: float, step: float) -> int:
    """How many of a user's go before what is due at `goal`: calculated, then mended by what rounding and ties do."""
    count = min(max(0, int((goal[0] - cost) / step)), len(theirs))
    while count < len(theirs) and (cost + count * step, theirs[count].sequence) < goal:
        count += 1
    while count and (cost + (count - 1) * step, theirs[count - 1].sequence) >= goal:
        count -= 1
    return count
