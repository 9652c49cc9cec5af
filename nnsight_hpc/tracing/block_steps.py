"""Loops over the steps of a generation in rewritten code: a name is, after a step that never came, what it was before it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from nnsight_hpc.graph.build import IF, LIST, MERGE, REACHED
from nnsight_hpc.tracing.block_loops import PlainLoop
from nnsight_hpc.tracing.block_merge import PLAIN, UNBOUND, names_in, recordable, same
from nnsight_hpc.tracing.value import Value

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import FrameType

    from nnsight_hpc.tracing.block_loops import LoopNames
    from nnsight_hpc.tracing.iteration import Steppings


class StepLoop(PlainLoop):
    """A ``for`` over ``tracer.iter[…]``, unrolled. The generation may end before the last step.

    Parameters
    ----------
    items
        What the loop's target is at each step.
    """

    recorded = True

    def __init__(self, steps: Steppings, items: Iterable[Any], names: LoopNames) -> None:
        super().__init__(self._each(iter(items)))
        self._steps, self._bound = steps, names
        self._names: dict[str, Any] = {}
        self._lists: list[tuple[list[Any], int]] = []  # those that the body fills, with their lengths before the step

    def container(self, name: str) -> Any:
        """A list or dict that the body fills, which stays Python's."""
        held = names_in(sys._getframe(1), (name,))[name]  # noqa: SLF001 - the rewritten code
        if type(held) is list:
            self._lists.append((held, len(held)))
        return held

    def carried(self, name: str) -> Any:
        """What a name is at the start of a step, and after the loop."""
        return self._names[name] if name in self._names else names_in(sys._getframe(1), (name,))[name]  # noqa: SLF001

    after = carried

    def leave(self, last: Any) -> bool:
        leaves = super().leave(last)
        if leaves:
            self._settle(sys._getframe(1))  # noqa: SLF001 - the rewritten code
        return leaves

    def _each(self, items: Iterator[Any]) -> Iterator[Any]:
        frame = sys._getframe(1)  # noqa: SLF001 - the rewritten code, each time that the loop asks for an item
        self._names = names_in(frame, self._bound.variables)
        for item in items:
            yield item
            self._settle(sys._getframe(1))  # noqa: SLF001

    def _settle(self, frame: FrameType) -> None:
        """A step is over: where it was not reached, names are what they were."""
        now = names_in(frame, self._bound.variables)
        changed = [name for name in self._bound.used if _is_other(self._names[name], now[name])]
        plain = [
            (held, at) for held, before in self._lists for at in range(before, len(held)) if type(held[at]) in PLAIN
        ]
        self._lists = [(held, len(held)) for held, _ in self._lists]
        if (changed or plain) and self._steps.may_not_come:
            point = self._steps.point()
            reached = None if point is None else _reached(point)
            for name in changed:
                now[name] = _settled(self._names[name], now[name], reached)
            if reached is not None:
                for held, at in plain:
                    held[at] = _only_if(reached, held[at])
        self._names = now


def _is_other(before: Any, now: Any) -> bool:
    return before is not UNBOUND and not same(before, now) and recordable(before) and recordable(now)


def _reached(value: Value) -> Value:
    """A conditional on whether the model came to a value."""
    return value.recorder.record(IF, value.recorder.record(REACHED, value))


def _only_if(reached: Value, entry: Any) -> Value:
    """A number or string that is in a list where its step came, and nothing there where it did not."""
    recorder = reached.recorder
    with recorder.inside(reached):
        value = recorder.record("operator.getitem", recorder.record(LIST, entry), 0)
        value.saved = recorder.save(value)
    return value


def _settled(before: Any, now: Any, reached: Value | None) -> Any:
    """What a name is after a step, where `reached` says whether that came; None: the value itself tells."""
    if reached is None:
        if type(now) is not Value:
            return now
        reached = _reached(now)
    kept = reached.recorder.record(MERGE, reached, now, before)
    kept.saved = now.saved if type(now) is Value else None  # of a step that never came `repeats` knows the one before
    return kept
