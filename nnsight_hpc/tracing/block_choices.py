"""Conditionals in rewritten code: ``if`` statements, and the expressions that evaluate a part of theirs only sometimes."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from nnsight_hpc.graph.build import ELSE, IF
from nnsight_hpc.tracing.block_containers import Containers
from nnsight_hpc.tracing.block_merge import after_branches, merged, names_in, opened
from nnsight_hpc.tracing.control import Cond, Else
from nnsight_hpc.tracing.value import Value

if TYPE_CHECKING:
    from types import FrameType, TracebackType

    from nnsight_hpc.tracing.block_objects import Objects


class PlainBranch:
    """An ``if`` whose test is Python's own."""

    recorded = False

    def __init__(self, truth: bool) -> None:
        self.first, self.second = truth, not truth

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        pass


TAKEN, UNTAKEN = PlainBranch(truth=True), PlainBranch(truth=False)


class Branch:
    """An ``if`` on a value: both sides are recorded, each with the names as they were before it."""

    recorded = first = second = True

    def __init__(self, test: Value, names: tuple[str, ...], containers: Containers) -> None:
        self._names, self._recorder, self._containers = names, test.recorder, containers
        self._before: dict[str, Any] = {}
        self._condition = self._recorder.record(IF, test)
        self._sides: list[dict[str, Any]] = []

    def container(self, name: str) -> Any:
        """A list or dict that lives where the graph runs, for one that the branches change."""
        return self._containers.of_worker(name, sys._getframe(1), self._recorder)  # noqa: SLF001 - the rewritten code

    def __enter__(self) -> None:
        if not self._sides:
            self._before = names_in(sys._getframe(1), self._names)  # noqa: SLF001
        if self._sides:
            self._containers.objects.open_again()
        else:
            self._containers.objects.open(self._recorder, self._names)
        self._stack = opened(self._recorder.record(ELSE, self._condition) if self._sides else self._condition)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._sides.append(names_in(sys._getframe(1), self._names))  # noqa: SLF001
        self._stack.close()
        self._containers.objects.close(failed=kind is not None)

    def before(self, name: str) -> Any:
        return self._before[name]

    def after(self, name: str) -> Any:
        first, second = self._sides if len(self._sides) > 1 else (*self._sides, self._before)
        return after_branches(self._condition, first[name], second[name], name)


class Conditional:
    """``with tracer.cond(value) as c:`` or ``with c.else_():``, whose names are merged like those of an ``if``."""

    recorded = True

    def __init__(self, manager: Cond | Else, names: tuple[str, ...], containers: Containers) -> None:
        self._manager, self._names, self._containers = manager, names, containers
        self._start: dict[str, Any] = {}
        self._other: dict[str, Any] = {}
        self._now: dict[str, Any] = {}

    def container(self, name: str) -> Any:
        return self._containers.of_worker(name, sys._getframe(1), self._manager.recorder)  # noqa: SLF001

    def before(self, name: str) -> Any:
        """What a name is at the start of the block: in an ``else_()`` what it was before the ``cond``."""
        held = names_in(sys._getframe(1), (name,))[name]  # noqa: SLF001 - the rewritten code
        other, start, left = self._manager.sides.get(name, (held, held, held))
        self._other[name], self._start[name] = (other, start) if left is held else (held, held)
        return self._start[name]

    def __enter__(self) -> Cond | Else:
        self._manager.open()
        self._containers.objects.open(self._manager.recorder, self._names)
        return self._manager

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._now = names_in(sys._getframe(1), self._names)  # noqa: SLF001
        self._manager.close()
        self._containers.objects.close(failed=kind is not None)

    def after(self, name: str) -> Any:
        manager, now = self._manager, self._now[name]
        if isinstance(manager, Else):
            return after_branches(manager.condition, self._other[name], now, name)
        left = after_branches(manager.condition, now, self._start[name], name)
        manager.sides[name] = now, self._start[name], left
        return left


class Managed(ExitStack):
    """A context manager that has nothing to do with values."""

    recorded = False

    def __init__(self, manager: Any) -> None:
        super().__init__()
        self._manager = manager

    def __enter__(self) -> Any:
        super().__enter__()
        return self.enter_context(self._manager)


class Choices:
    """``and``, ``or``, ``not``, ``a if b else c`` and chained comparisons; those that are open, the innermost last."""

    def __init__(self, frame: FrameType) -> None:
        self._containers = Containers(frame)
        self._open: list[Any] = []
        self._middles: list[Any] = []

    def place(self) -> int:
        """How many expressions are open."""
        return len(self._open)

    def back_to(self, place: int) -> None:
        """An exception left the expressions that were opened since."""
        while len(self._open) > place:
            self._open.pop().abandon()

    def branch(self, test: Any, names: tuple[str, ...]) -> Branch | PlainBranch:
        if type(test) is Value:
            return Branch(test, names, self._containers)
        return TAKEN if test else UNTAKEN

    def not_(self, operand: Any) -> Any:
        return operand.recorder.record("operator.not_", operand) if type(operand) is Value else not operand

    def both(self, first: Any) -> bool:
        """After the first operand of ``and``: whether the second is evaluated."""
        if type(first) is not Value:
            return self._plain(first, bool(first))
        self._begin(first, first.recorder.record(IF, first)).enter()
        return True

    def either(self, first: Any) -> bool:
        """After the first operand of ``or``: whether the second is left out."""
        if type(first) is not Value:
            return self._plain(first, bool(first))
        self._begin(first, first.recorder.record(IF, first), negative=True).enter()
        return False

    def first(self) -> Any:
        return self._open.pop().operand

    def second(self, other: Any) -> Any:
        choice = self._open.pop()
        choice.close()
        if choice.condition is None:
            return other
        sides = (choice.operand, other) if choice.negative else (other, choice.operand)
        return merged(choice.condition, *sides)

    def middle(self, operand: Any) -> Any:
        """The second operand of ``a < b < c``."""
        self._middles.append(operand)
        return operand

    def chain(self, first: Any) -> bool:
        middle = self._middles.pop()
        result = self.both(first)
        self._open[-1].middle = middle
        return result

    def again(self) -> Any:
        return self._open[-1].middle

    def test(self, test: Any) -> bool:
        """After the test of ``a if test else b``: whether `a` is evaluated."""
        return self.both(test)

    def side(self, value: Any) -> Any:
        self._open[-1].close()
        return value

    def otherwise(self) -> bool:
        choice = self._open[-1]
        if choice.condition is None:
            return not choice.truth
        choice.negative = True
        choice.enter()
        return True

    def chosen(self, first: Any, second: Any) -> Any:
        choice = self._open.pop()
        if choice.condition is None:
            return first if choice.truth else second
        return merged(choice.condition, first, second)

    def _plain(self, operand: Any, truth: bool) -> bool:
        self._begin(operand, None).truth = truth
        return truth

    def _begin(self, operand: Any, condition: Value | None, *, negative: bool = False) -> _Choice:
        choice = _Choice(self._containers.objects, operand, condition, negative=negative)
        self._open.append(choice)
        return choice


class _Choice:
    """An expression that is being evaluated: its first operand, and the conditional if that is a value."""

    middle: Any = None
    truth = True
    _stack: ExitStack | None = None

    def __init__(self, objects: Objects, operand: Any, condition: Value | None, *, negative: bool) -> None:
        self._objects = objects
        self.operand, self.condition, self.negative = operand, condition, negative

    def enter(self) -> None:
        """Record what follows in the side that is now evaluated."""
        assert self.condition is not None
        recorder = self.condition.recorder
        self._objects.open(recorder)
        self._stack = opened(recorder.record(ELSE, self.condition) if self.negative else self.condition)

    def close(self, *, failed: bool = False) -> None:
        """Leave the side that was entered, if one was."""
        stack, self._stack = self._stack, None
        if stack is not None:
            stack.close()
            self._objects.close(failed=failed)

    def abandon(self) -> None:
        """An exception left it."""
        self.close(failed=True)
