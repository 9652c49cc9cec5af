"""The requests that wait for one pool, in memory: which of them may go next, together with which, and where each stands."""

from __future__ import annotations

from bisect import bisect_left, insort
from itertools import chain, takewhile
from typing import TYPE_CHECKING

from nnsight_hpc.daemon.positions import Positions
from nnsight_hpc.daemon.turns import Line

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nnsight_hpc.daemon.turns import Order, Waiting


class Queue:
    """All that waits for one pool: runs, of which those with the same `batch` may go together, and dumps."""

    def __init__(self) -> None:
        self.runs, self.dumps = Line(), Line()
        self._positions = {"run": Positions(), "dump": Positions()}
        self._batches: dict[str, Line] = {}
        self._known: dict[str, Waiting] = {}
        self._since: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._known)

    def add(self, one: Waiting) -> None:
        """One that is here already takes its new place."""
        self.remove(one.id)
        if one.batch:
            self._batches.setdefault(one.batch, Line())
        for line in self._lines(one):
            line.add(one)
        self._positions[one.kind].add(one)
        insort(self._since, (one.since, one.id))
        self._known[one.id] = one

    def remove(self, request: str) -> Waiting | None:
        """The one that waits here no more; nothing happens where it does not."""
        one = self._known.pop(request, None)
        if one is None:
            return None
        for line in self._lines(one):
            line.remove(one)
        self._positions[one.kind].remove(one)
        del self._since[bisect_left(self._since, (one.since, one.id))]
        if one.batch and not self._batches[one.batch]:
            del self._batches[one.batch]
        return one

    def find(self, request: str) -> Waiting | None:
        return self._known.get(request)

    @property
    def oldest(self) -> float | None:
        """Since when the one waits that has waited longest."""
        return self._since[0][0] if self._since else None

    def older(self, moment: float) -> list[str]:
        """What has waited since before `moment`."""
        return [request for _, request in takewhile(lambda each: each[0] < moment, self._since)]

    def first(self, order: Order, within: float) -> Waiting | None:
        """What goes next of that which needs so many seconds at most: runs before dumps."""
        return self.runs.first(order, within) or self.dumps.first(order, within)

    def in_order(self, order: Order) -> Iterator[Waiting]:
        """All of it, as it would go."""
        return chain(self.runs.in_order(order), self.dumps.in_order(order))

    def companions(self, one: Waiting, order: Order, within: float) -> Iterator[Waiting]:
        """Those that may share a forward with a run, and need so many seconds at most, in the fair order."""
        return (other for other in self._batches[one.batch].in_order(order, within) if other != one)

    def sharing(self, one: Waiting) -> int:
        """How many may share a forward with a run, itself among them."""
        return len(self._batches[one.batch])

    def of(self, user: str) -> Iterator[Waiting]:
        """A user's, as they would go."""
        return chain(*(positions.of(user) for positions in self._positions.values()))

    def before(self, one: Waiting, order: Order) -> int:
        """How many would go before a request as things stand; before a dump go all runs."""
        return self._positions[one.kind].before(one, order) + (len(self.runs) if one.kind == "dump" else 0)

    def _lines(self, one: Waiting) -> Iterator[Line]:
        """Those in which it stands."""
        yield self.dumps if one.kind == "dump" else self.runs
        if one.batch:
            yield self._batches[one.batch]
