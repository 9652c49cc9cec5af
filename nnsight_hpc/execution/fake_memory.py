"""How much memory fake tensors would take: they are freed when the real ones of such a run are."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import ref

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch


class Alive:
    """Follows the fake tensors that operations make (`Mode.follow`).

    Memory that several share counts once, and as long as any of them lives. What was `given` does not count.

    Attributes
    ----------
    now, peak
        Bytes that are held now, and that were held at most since `since` was asked for.
    """

    def __init__(self, given: Iterable[torch.Tensor]) -> None:
        self.now = self.peak = 0
        self._given = {storage_of(tensor) for tensor in given}
        self._tensors: dict[int, ref[torch.Tensor]] = {}
        self._holders: Counter[int] = Counter()

    def follow(self, _given: Any, made: Iterable[torch.Tensor]) -> None:
        """Take in what an operation returns: new tensors, views, or what it was given."""
        for tensor in made:
            memory = storage_of(tensor)
            if memory in self._given or id(tensor) in self._tensors:
                continue
            size = tensor.untyped_storage().nbytes()
            self._tensors[id(tensor)] = ref(tensor, partial(self._gone, id(tensor), memory, size))
            self.now += 0 if self._holders[memory] else size
            self._holders[memory] += 1
        self.peak = max(self.peak, self.now)

    def since(self) -> tuple[int, int]:
        """The most that was held since this was asked for the last time, and what is held now."""
        peak, self.peak = self.peak, self.now
        return peak, self.now

    def _gone(self, tensor: int, memory: int, size: int, _reference: Any) -> None:
        del self._tensors[tensor]
        self._holders[memory] -= 1
        self.now -= 0 if self._holders[memory] else size


def storage_of(tensor: torch.Tensor) -> int:
    """Which memory a fake tensor lies in: equal for those that share it, as long as one of them lives."""
    return int(tensor.untyped_storage()._cdata)  # noqa: SLF001 - which storage it is; it has no address
