"""Saves that one line makes at each step of a generation: where a later step never came, the last one that did counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nnsight_hpc.graph.nodes import Source


class Repeats:
    """For each save of an ``iter`` block, the save that the same instruction made a step before.

    Attributes
    ----------
    stepping
        The loop over steps is being recorded.
    """

    def __init__(self) -> None:
        self._earlier: dict[int, int | None] = {}
        self._last: dict[tuple[int, int], int] = {}
        self._times: dict[int, int] = {}
        self.stepping = False

    def begin(self) -> None:
        """A new loop over steps begins: nothing in it repeats what was before."""
        self._last.clear()

    def step(self) -> None:
        """The next step of the loop begins."""
        self._times.clear()
        self.stepping = True

    def end(self) -> None:
        self.stepping = False

    def note(self, save: int, source: Source | None) -> None:
        """A save was recorded in such a loop; every instruction has a `source` of its own, which the recording holds."""
        place = id(source)
        self._times[place] = self._times.get(place, 0) + 1
        site = (place, self._times[place])
        self._earlier[save] = self._last.get(site)
        self._last[site] = save

    def back_from(self, save: int) -> Iterator[int]:
        """The save itself, then those of the steps before it, the latest first."""
        current: int | None = save
        while current is not None:
            yield current
            current = self._earlier.get(current)
