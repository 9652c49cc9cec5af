"""Saves that one line makes at each step of a generation: where a later step never came, the last one that did counts."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from nnsight_hpc.tracing.lines import users_frame

if TYPE_CHECKING:
    from collections.abc import Iterator

    Site = tuple[object, int, int]


class Repeats:
    """For each save of an ``iter`` block, the save that the same instruction made a step before."""

    def __init__(self) -> None:
        self._earlier: dict[int, int | None] = {}
        self._last: dict[Site, int] = {}
        self._times: Counter[tuple[object, int]] = Counter()
        self._stepping = False

    def begin(self) -> None:
        """A new loop over steps begins: nothing in it repeats what was before."""
        self._last.clear()

    def step(self) -> None:
        """The next step of the loop begins."""
        self._times.clear()
        self._stepping = True

    def end(self) -> None:
        self._stepping = False

    def note(self, save: int) -> None:
        """A save was recorded at the line that the researcher is at."""
        if not self._stepping:
            return
        frame = users_frame()
        place = (frame.f_code, frame.f_lasti)
        self._times[place] += 1
        site = (*place, self._times[place])
        self._earlier[save] = self._last.get(site)
        self._last[site] = save

    def back_from(self, save: int) -> Iterator[int]:
        """The save itself, then those of the steps before it, the latest first."""
        current: int | None = save
        while current is not None:
            yield current
            current = self._earlier.get(current)
