"""What a model holds on its way through one forward, from each point that a graph touches to the next."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Mapping, Sequence

    from nnsight_hpc.execution.fake_model import Footprint, Place


class Course:
    """How far a forward has come, in the order in which the graph's nodes are counted.

    Parameters
    ----------
    touched
        The places that the graph touches.
    further
        Steps of a generation beyond those that the footprint has.
    outputs
        Of a forward that is differentiated, for each place by number the bytes of all outputs up to there: those from the
        first place on that is touched are held. Of others nothing.

    Attributes
    ----------
    holds
        Bytes that the model holds at the place where it is, without the value that stands there.
    """

    def __init__(
        self, footprint: Footprint, touched: Collection[Place], *, further: int, outputs: Sequence[int]
    ) -> None:
        self._number, self._held, self._outputs = footprint.number, footprint.held, outputs
        self._growth, self._touched = footprint.growth * further, sorted(map(self._at, touched))
        self._behind = self.holds = 0

    def whole(self) -> int:
        """The most that it holds until the last place that is touched."""
        if not self._touched:
            return 0
        last = self._touched[-1]
        return max(peak for peak, _ in self._held[: last + 1]) + self._growth + self._for_backward(last)

    def to(self, place: Place, value: Mapping[Hashable, int]) -> int:
        """Go on to a place; the most that is held on the way, beyond what it held before. Nothing for a place behind.

        Parameters
        ----------
        value
            The memory of what the graph has read there: it is the graph's from now on.
        """
        at = self._at(place)
        if at < self._behind:
            return 0
        way = max(peak for peak, _ in self._held[self._behind : at + 1]) - self.holds
        own = max(0, self._held[at][1] - sum(value.values()))
        self._behind = at + 1
        self.holds = max(own, self._for_backward(at)) + (0 if place in self._number else self._growth)
        return max(0, way)

    def _at(self, place: Place) -> int:
        return self._number.get(place, len(self._held) - 1)

    def _for_backward(self, at: int) -> int:
        return self._outputs[at] - self._outputs[self._touched[0]] if self._outputs else 0
