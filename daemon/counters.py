"""What has been counted since the daemon started: requests that have ended, how long they waited, and how long they ran."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, NamedTuple

from nnsight_hpc.wire.states import RequestState

if TYPE_CHECKING:
    from nnsight_hpc.daemon.table import Row

BOUNDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)
"""Upper ends of a histogram's buckets, in seconds; a last one has no end."""

STEP, SPAN = 5.0, 600.0
"""Of what has ended lately: counted in steps of so many seconds, for so long."""

_Q = RequestState


class Requested(NamedTuple):
    """Which requests are counted together."""

    pool: str
    kind: str


class Histogram:
    """How many values were at most each of `BOUNDS`, and their sum."""

    def __init__(self) -> None:
        self.counts, self.sum = [0] * (len(BOUNDS) + 1), 0.0

    def add(self, seconds: float) -> None:
        seconds = max(0.0, seconds)  # clocks are set back at times, and a sum must not fall
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.sum += seconds


class Recent:
    """How many have ended in each `STEP` of the last `SPAN` seconds: what is older is forgotten at the next."""

    def __init__(self) -> None:
        self._steps: Counter[int] = Counter()

    def add(self, when: float) -> None:
        self._steps[int(when // STEP)] += 1
        if len(self._steps) > SPAN / STEP:
            del self._steps[min(self._steps)]

    def since(self, when: float) -> list[tuple[float, int]]:
        """The beginnings of the steps in which any has ended, and how many, from the step of that moment on."""
        return sorted((step * STEP, count) for step, count in self._steps.items() if step >= when // STEP)


class Counters:
    """Hears of each change of a request's state, some of them twice, and counts its end once."""

    def __init__(self) -> None:
        self._alive: set[str] = set()
        self.ends: Counter[tuple[Requested, RequestState]] = Counter()
        self.waits: defaultdict[Requested, Histogram] = defaultdict(Histogram)
        self.runs: defaultdict[Requested, Histogram] = defaultdict(Histogram)
        self.recent = Recent()

    def note(self, row: Row) -> None:
        if not row.state.ended:
            self._alive.add(row.id)
        elif row.id in self._alive:
            self._alive.remove(row.id)
            self._ended(row)

    def forget(self, request: str) -> None:
        """There is no such request."""
        self._alive.discard(request)

    def _ended(self, row: Row) -> None:
        of, end = Requested(row.pool, row.kind), row.times[row.state]
        queued = row.times.get(_Q.QUEUED, end)
        begun = row.times.get(_Q.RUNNING, 0.0)
        ran = begun >= queued  # else it was before it was queued again
        self.ends[of, row.state] += 1
        self.recent.add(end)
        self.waits[of].add((begun if ran else end) - queued)
        if ran:
            self.runs[of].add(end - begun)
