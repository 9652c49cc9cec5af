"""Loops over values whose length is known while the block is recorded (under ``scan`` and ``validate``): Python runs them."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from nnsight_hpc.graph.build import LOOP
from nnsight_hpc.tracing.value import Value

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

MOST = 1000
"""The most passes that are recorded one by one, those of nested loops multiplied; longer loops are loops of the graph."""


class Unrolling:
    """The unrolled loops of one block."""

    def __init__(self) -> None:
        self._passes = 1  # of the loops that are running, multiplied

    def of(self, items: Any) -> Any:
        """The elements of a value of known length; anything else itself."""
        count = _length(items) if type(items) is Value else None
        if count is None or self._passes * count > MOST:
            return items
        return Unrolled(self, lambda: (items[index] for index in range(count)), count)

    def joined(self, function: Callable[..., Iterable[Any]], args: list[Any], kwargs: dict[str, Any]) -> Any:
        """``enumerate(…)`` or ``zip(…)`` of what `of` gave."""
        counts = [argument.count for argument in args if type(argument) is Unrolled]
        made = functools.partial(_with_elements, function, args, kwargs)
        return Unrolled(self, made, max(counts)) if counts else made()

    def running(self, unrolled: Unrolled) -> Iterator[Any]:
        count = max(unrolled.count, 1)
        self._passes *= count
        try:
            yield from unrolled.make()
        finally:
            self._passes //= count


class Unrolled:
    """What an unrolled loop runs over: the iterable that `make` gives, of at most `count` elements."""

    def __init__(self, owner: Unrolling, make: Callable[[], Iterable[Any]], count: int) -> None:
        self._owner, self.make, self.count = owner, make, count

    def __iter__(self) -> Iterator[Any]:
        return self._owner.running(self)


def _with_elements(function: Callable[..., Iterable[Any]], args: list[Any], kwargs: dict[str, Any]) -> Iterable[Any]:
    return function(*[a.make() if type(a) is Unrolled else a for a in args], **kwargs)


def _length(value: Value) -> int | None:
    """How many elements a value has in each run; None where that is not known.

    In a loop of the graph it is not: what is looked at there is the first pass.
    """
    recorder = value.recorder
    block = None if recorder.block is None else recorder.builder.nodes[recorder.block]
    if recorder.shadow is None or (block is not None and (block.op == LOOP or recorder.in_loop(block))):
        return None
    fake = recorder.shadow.value(value.node)  # not `value.fake`: a list that a branch may have filled since is unknown
    return len(fake) if isinstance(fake, list | tuple) or getattr(fake, "ndim", 0) > 0 else None
