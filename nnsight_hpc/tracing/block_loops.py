"""Loops over values in rewritten code: ``for`` statements and comprehensions, and the lists that they fill."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from nnsight_hpc.graph.build import CARRIED, END, FINAL, IF, ITEM, LIST, LOOP, NEXT, RANGE
from nnsight_hpc.tracing.block_merge import UNBOUND, Undecided, names_in, opened, recordable, replaced
from nnsight_hpc.tracing.block_unroll import Unrolled
from nnsight_hpc.tracing.lines import users_line
from nnsight_hpc.tracing.value import Value
from nnsight_hpc.wire.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import ExitStack
    from types import FrameType, TracebackType
    from typing import Self

    from nnsight_hpc.tracing.block_containers import Containers
    from nnsight_hpc.tracing.block_unroll import Unrolling

_LIGHT = frozenset({type(None), bool, int, float, complex, str, Value})


class Over:
    """What a loop over a value runs over: the value, ``range``, ``enumerate`` or ``zip``, nested as they are written."""

    def __init__(self, source: Value, item: Callable[[Pass, Value], Any] = lambda _turn, entry: entry) -> None:
        self.source, self.item = source, item


def over(items: Any) -> Over | None:
    """`items` as something that a recorded loop runs over; None when Python can iterate over it."""
    if type(items) is Over:
        return items
    return Over(items) if type(items) is Value else None


def iterable(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``range(…)``, ``enumerate(…)``, ``zip(…)``, whose arguments may be values."""
    value = next((a if type(a) is Value else a.source for a in args if type(a) in (Value, Over)), None)
    if value is None or function not in (range, enumerate, zip):
        return function(*args, **kwargs)
    if function is range:
        start, stop, step = (0, *args, 1) if len(args) == 1 else (*args, 1)[:3]
        return Over(value.recorder.record(RANGE, start, stop, step))
    first, *others = (
        over(a) or Over(value.recorder.record(LIST, *a)) for a in (args[:1] if function is enumerate else args)
    )
    if function is zip:
        return Over(first.source, lambda turn, entry: (first.item(turn, entry), *map(turn.entry_of, others)))
    start = args[1] if len(args) > 1 else kwargs.get("start", 0)
    return Over(first.source, lambda turn, entry: (turn.count(start), first.item(turn, entry)))


class Pass:
    """The one pass of a loop that is recorded, which stands for all."""

    def __init__(self, source: Value) -> None:
        self.recorder = source.recorder
        self.loop = self.recorder.record(LOOP, source)
        self._stack: ExitStack = opened(self.loop)
        self._counts: list[Value] = []

    def item(self, over: Over) -> Any:
        """What the loop's targets are in this pass."""
        return over.item(self, self.recorder.record(ITEM, self.loop))

    def count(self, start: Any) -> Value:
        """A number that is `start` in the first pass and one more in each."""
        value = self.recorder.record(CARRIED, self.loop, start)
        self._counts.append(value)
        return value

    def entry_of(self, other: Over) -> Any:
        """What another iterable has at this pass."""
        return other.item(self, self.recorder.record("operator.getitem", other.source, self.count(0)))

    def end(self) -> Value:
        """Leave the loop; its results are had from what this returns."""
        for value in self._counts:
            self.recorder.record(NEXT, value, self.recorder.record("operator.add", value, 1))
        self._stack.close()
        return self.recorder.record(END, self.loop)

    def abandon(self) -> None:
        self._stack.close()


class PlainLoop:
    """A ``for`` over what Python can iterate over."""

    recorded = False

    def __init__(self, items: Any) -> None:
        self.items = items

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        pass


class RecordedLoop:
    """A ``for`` over a value: an iterator of one pass, in which names that go from pass to pass are variables of the loop.

    Parameters
    ----------
    targets, variables
        The names that the statement, and the statements in it, bind.
    first
        Those of the variables that may be read before they are bound.
    containers
        The names whose entries the statements append or assign.
    """

    recorded = True

    def __init__(
        self,
        over: Over,
        targets: tuple[str, ...],
        variables: tuple[str, ...],
        first: tuple[str, ...],
        containers: Containers,
    ) -> None:
        self._over, self._targets, self._variables, self._first = over, targets, variables, first
        self._containers = containers
        self._pass: Pass | None = None
        self._end: Value | None = None
        self._start: dict[str, Any] = {}
        self._carried: dict[str, Value] = {}
        self._now: dict[str, Any] = {}
        self.items = self

    def __enter__(self) -> Self:
        self._containers.objects.open(sys._getframe(1))  # noqa: SLF001 - the rewritten code
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._containers.objects.close()
        if self._end is not None or self._pass is None:
            return
        self._pass.abandon()
        if kind is None:
            raise InvalidInput(
                "a loop over a value cannot be left by `break`",
                where=str(users_line()),
                why="its length is known only where the graph runs",
                next="write `if` around what is to be left out",
            )

    def container(self, name: str) -> Any:
        """Before the loop: a list or dict that lives where the graph runs, for one that the body fills."""
        frame = sys._getframe(1)  # noqa: SLF001 - the rewritten code
        return self._containers.of_worker(name, frame, self._over.source.recorder)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        frame = sys._getframe(1)  # noqa: SLF001 - the rewritten code
        if self._pass is not None:
            self._finish(self._pass, frame)
            raise StopIteration
        self._start = names_in(frame, self._variables)
        initial = {name: self._first_value(held) for name, held in self._start.items() if self._is_carried(name, held)}
        self._pass = Pass(self._over.source)
        for name, value in initial.items():
            self._carried[name] = self._pass.recorder.record(CARRIED, self._pass.loop, value)
        return self._pass.item(self._over)

    def carried(self, name: str) -> Any:
        """What a variable is at the start of a pass."""
        return self._carried.get(name, self._start[name])

    def after(self, name: str) -> Any:
        """What a name is after the loop."""
        assert self._end is not None
        now = self._now[name]
        carried = self._carried.get(name)
        if carried is None:
            started = self._start.get(name, UNBOUND)
            lost = name in self._first and started is not UNBOUND and now is not started
            return Undecided(name) if lost else replaced(now, self._last)
        if now is carried:
            return self._start[name]
        if now is UNBOUND or not recordable(now):
            return Undecided(name)
        value = self._end.recorder.record(FINAL, self._end, carried)
        value.saved = now.saved if type(now) is Value else None
        return value

    def _is_carried(self, name: str, held: Any) -> bool:
        return type(held) in _LIGHT or (name in self._first and held is not UNBOUND and recordable(held))

    def _first_value(self, held: Any) -> Any:
        """What a variable starts from; of a tensor a copy, since the body may change it in place."""
        tensor = type(held) is not Value and hasattr(held, "untyped_storage")
        return self._over.source.recorder.record("Tensor.clone", held) if tensor else held

    def _finish(self, turn: Pass, frame: FrameType) -> None:
        self._now = names_in(frame, (*self._targets, *self._variables))
        for name, carried in self._carried.items():
            now = self._now[name]
            if now is not carried and now is not UNBOUND and recordable(now):
                turn.recorder.record(NEXT, carried, now)
        self._end = turn.end()

    def _last(self, value: Value) -> Value:
        """What a value of the body was at the last pass."""
        assert self._pass is not None
        assert self._end is not None
        if value.recorder is not self._end.recorder or value.node < self._pass.loop.node:
            return value
        final = self._end.recorder.record(FINAL, self._end, value)
        final.saved = value.saved
        return final


class Gather:
    """A comprehension: its entries, in a list that lives where the graph runs as soon as a value decides which there are."""

    def __init__(self, containers: Containers, unrolling: Unrolling) -> None:
        self._containers, self._unrolling = containers, unrolling
        self._states: list[_Gathering] = []

    def open(self) -> Gather:
        self._states.append(_Gathering())
        return self

    def over(self, items: Any) -> Any:
        """What one of its ``for`` runs over."""
        items = self._unrolling.of(items)
        if not self._states:
            return items
        state, value = self._states[-1], over(items)
        if value is None:
            state.eager = state.eager or type(items) is Unrolled
            return state.plain(items)
        state.decided_by(value.source)
        return state.recorded(value)

    def guard(self, test: Any) -> bool:
        """One of its ``if``."""
        if type(test) is not Value or not self._states:
            return bool(test)
        state = self._states[-1]
        state.decided_by(test)
        state.guards.append(opened(test.recorder.record(IF, test)))
        return True

    def entry(self, item: Any) -> Any:
        if self._states:
            self._states[-1].add(item)
        return item

    def done(self, made: list[Any]) -> Any:
        """The list, of Python or of the worker."""
        state = self._states.pop()
        state.unwind(0)
        if state.list is None:
            return made
        self._containers.note(state.list)
        return state.list

    def generated(self, made: Iterator[Any]) -> Any:
        """The generator, or what it makes where it runs over a value or one decides that."""
        if self._states[-1].list is None and not self._states[-1].eager:
            self._states.pop()
            return made
        found = self.done(list(made))
        return iter(found) if type(found) is list else found


class _Gathering:
    """One evaluation of a comprehension."""

    def __init__(self) -> None:
        self.list: Value | None = None
        self.eager = False
        self.guards: list[ExitStack] = []
        self._entries: list[Any] = []

    def decided_by(self, value: Value) -> None:
        if self.list is None:
            self.list = value.recorder.record(LIST, *self._entries)

    def add(self, item: Any) -> None:
        if self.list is None:
            self._entries.append(item)
        else:
            self.list.append(item)

    def plain(self, items: Any) -> Iterator[Any]:
        depth = len(self.guards)
        for item in items:
            yield item
            self.unwind(depth)

    def recorded(self, over: Over) -> Iterator[Any]:
        depth = len(self.guards)
        turn = Pass(over.source)
        yield turn.item(over)
        self.unwind(depth)
        turn.end()

    def unwind(self, depth: int) -> None:
        """Leave the conditionals that were opened since."""
        while len(self.guards) > depth:
            self.guards.pop().close()


def total(value: Value, start: Any = 0) -> Value:
    """``sum`` of a list, or along the first dimension of a tensor, that lives where the graph runs."""
    turn = Pass(value)
    recorder = turn.recorder
    so_far = recorder.record(CARRIED, turn.loop, start)
    recorder.record(NEXT, so_far, recorder.record("operator.add", so_far, turn.item(Over(value))))
    return recorder.record(FINAL, turn.end(), so_far)
