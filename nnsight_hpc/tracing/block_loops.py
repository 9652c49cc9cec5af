"""Loops over values in rewritten code: ``for`` and ``while`` statements, and comprehensions with the lists that they fill."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from nnsight_hpc.graph.build import CARRIED, CHECK, END, FINAL, IF, ITEM, LEAVE, LENGTH, LIST, LOOP, NEXT, RANGE
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
    from nnsight_hpc.tracing.block_objects import Objects
    from nnsight_hpc.tracing.block_unroll import Unrolling
    from nnsight_hpc.tracing.recorder import Recorder

MOST_PASSES = 1_000
"""The most passes of a ``while`` that a value decides."""
_MOST_UNROLLED = 10_000
"""The most passes of a loop of Python's that a value leaves."""
_SEQUENCES = frozenset({"list", "range", "split", "split_with_sizes", "tensor_split", "chunk", "unbind", "collect"})
"""The last part of the names of operations that give a list, tuple or range, never a tensor."""
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


def many(value: Value) -> Over:
    """What a ``while`` runs over that a value decides."""
    return Over(value.recorder.record(RANGE, MOST_PASSES))


def ended(going: Value) -> None:
    """After such a loop: whether its condition was false in the end."""
    recorder = going.recorder
    over = recorder.record("operator.not_", going)
    recorder.record(CHECK, over, f"a `while` on a value is not over after {MOST_PASSES} passes, the most that are made")


def iterable(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``range(…)``, ``enumerate(…)``, ``zip(…)``, ``reversed(…)``, whose arguments may be values."""
    value = next((a if type(a) is Value else a.source for a in args if type(a) in (Value, Over)), None)
    if value is None or function not in (range, enumerate, zip, reversed):
        return function(*args, **kwargs)
    if function is reversed:
        return _backwards(value) if type(args[0]) is Value else reversed(args[0])
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


def _backwards(value: Value) -> Over:
    """``reversed(value)``: of a tensor a flipped copy, as torch has it."""
    recorder = value.recorder
    if recorder.builder.nodes[value.node].op.rpartition(".")[2] not in _SEQUENCES:
        return Over(recorder.record("Tensor.flip", value, 0))
    last = recorder.record("operator.sub", recorder.record(LENGTH, value), 1)
    return Over(recorder.record(RANGE, last, -1, -1), lambda _turn, at: value[at])


class Pass:
    """The one pass of a loop that is recorded, which stands for all."""

    def __init__(self, source: Value) -> None:
        self.recorder = source.recorder
        self.loop = self.recorder.record(LOOP, source)
        self.stack: ExitStack = opened(self.loop)
        self._counts: list[Value] = []

    def item(self, over: Over) -> Any:
        """What the loop's targets are in this pass."""
        return over.item(self, self.recorder.record(ITEM, self.loop))

    def count(self, start: Any) -> Value:
        """A number that is `start` in the first pass and one more in each."""
        value = self.recorder.record(CARRIED, self.loop, start)
        self._counts.append(value)
        return self.recorder.record("operator.pos", value)  # after the loop it is what it was in the last pass

    def entry_of(self, other: Over) -> Any:
        """What another iterable has at this pass."""
        return other.item(self, self.recorder.record("operator.getitem", other.source, self.count(0)))

    def end(self) -> Value:
        """Leave the loop; its results are had from what this returns."""
        for value in self._counts:
            self.recorder.record(NEXT, value, self.recorder.record("operator.add", value, 1))
        self.stack.close()
        return self.recorder.record(END, self.loop)

    def abandon(self) -> None:
        self.stack.close()


class PlainLoop:
    """A ``for`` over what Python can iterate over.

    Parameters
    ----------
    shared
        The items have a name, so that what a loop leaves of an iterator may be used afterwards.
    """

    recorded = False

    def __init__(self, items: Any, *, shared: bool = False) -> None:
        self.items = items
        self._shared, self._passes = shared, 0

    def going(self, broken: Any) -> Any:
        """Whether a pass is made, `broken` telling whether an earlier one left the loop."""
        if type(broken) is not Value:
            return not broken
        self._passes += 1
        if self._passes > _MOST_UNROLLED or (self._shared and iter(self.items) is self.items):
            raise InvalidInput(
                "a loop over an iterator cannot be left by a `break` that a value decides",
                where=str(users_line()),
                why="all its passes are recorded, so that it has to end, and nothing of it is left for later",
                next="loop over a list of what is needed",
            )
        return broken.recorder.record("operator.not_", broken)

    def leave(self, last: Any) -> bool:
        """At the end of a pass: whether Python itself is to leave the loop."""
        return last is True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        pass


class LoopNames(NamedTuple):
    """The names that a loop binds, as its source tells them.

    Attributes
    ----------
    targets, variables
        Those that the statement, and the statements in it, bind.
    first
        Those of the variables that may be read before they are bound.
    used
        Those, and those that are read elsewhere in the block.
    unsure
        Those that a pass may not bind.
    """

    targets: tuple[str, ...]
    variables: tuple[str, ...]
    first: tuple[str, ...]
    used: tuple[str, ...]
    unsure: tuple[str, ...]


class RecordedLoop:
    """A ``for`` over a value: an iterator of one pass, in which names that go from pass to pass are variables of the loop."""

    recorded = True

    def __init__(self, over: Over, names: LoopNames, containers: Containers) -> None:
        self._over, self._bound, self._containers = over, names, containers
        self._pass: Pass | None = None
        self._open = False
        self._end: Value | None = None
        self._start: dict[str, Any] = {}
        self._carried: dict[str, Value] = {}
        self._now: dict[str, Any] = {}
        self.items = self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._open:
            self._containers.objects.close(failed=True)
        if self._end is not None or self._pass is None:
            return
        self._pass.abandon()

    def going(self, _broken: Any) -> bool:
        """Whether a pass is made: where the graph runs none is after the one that left the loop."""
        return True

    def leave(self, last: Any) -> bool:
        """At the end of a pass: record whether it is the last."""
        if last is not False:
            self._over.source.recorder.record(LEAVE, last)
        return False

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
        self._start = names_in(frame, self._bound.variables)
        initial = {name: self._first_value(held) for name, held in self._start.items() if self._is_carried(name, held)}
        self._pass = Pass(self._over.source)
        self._containers.objects.open(self._pass.recorder, {*self._bound.targets, *self._bound.variables}, loop=True)
        self._open = True
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
        started = self._start.get(name, UNBOUND)
        if carried is None:
            kept = name in self._bound.first or name in self._bound.unsure
            lost = kept and started is not UNBOUND and now is not started
            return Undecided(name) if lost else replaced(now, self._last)
        if now is carried or now is UNBOUND:
            return self._start[name]
        if not recordable(now):
            return Undecided(name) if started is not UNBOUND else now
        value = self._end.recorder.record(FINAL, self._end, carried)
        value.saved = now.saved if type(now) is Value else None
        return value

    def _is_carried(self, name: str, held: Any) -> bool:
        kept = name in self._bound.first or name in self._bound.unsure
        return type(held) in _LIGHT or (kept and (held is UNBOUND or recordable(held)))

    def _first_value(self, held: Any) -> Any:
        """What a variable starts from; of a tensor a copy, since the body may change it in place."""
        if held is UNBOUND:
            return nothing(self._over.source.recorder)
        tensor = type(held) is not Value and hasattr(held, "untyped_storage")
        return self._over.source.recorder.record("Tensor.clone", held) if tensor else held

    def _finish(self, turn: Pass, frame: FrameType) -> None:
        self._open = False
        self._containers.objects.close()
        self._now = names_in(frame, (*self._bound.targets, *self._bound.variables))
        others = [name for name in self._now if name not in self._carried]
        self._now |= {name: replaced(self._now[name], self._held_on) for name in others}
        for name, carried in self._carried.items():
            now = self._now[name]
            if now is not carried and now is not UNBOUND and recordable(now):
                turn.recorder.record(NEXT, carried, now)
        self._end = turn.end()

    def _held_on(self, value: Value) -> Value:
        """A variable of the loop, bound to another name: as it is in this pass, not what it is next."""
        if all(value is not carried for carried in self._carried.values()):
            return value
        return value.recorder.record("operator.getitem", value.recorder.record(LIST, value), 0)

    def _last(self, value: Value) -> Value:
        """What a value of the body was at the last pass."""
        assert self._pass is not None
        assert self._end is not None
        if value.recorder is not self._end.recorder or value.node < self._pass.loop.node:
            return value
        final = self._end.recorder.record(FINAL, self._end, value)
        final.saved = value.saved
        return final


def nothing(recorder: Recorder) -> Value:
    """A value that is never made: what a name is that is not bound yet."""
    never = recorder.record(IF, False)
    with recorder.inside(never):
        return recorder.record(LIST)


class Gather:
    """A comprehension: its entries, in a list that lives where the graph runs as soon as a value decides which there are."""

    def __init__(self, containers: Containers, unrolling: Unrolling, opened: list[Any]) -> None:
        self._containers, self._unrolling, self._opened = containers, unrolling, opened
        self._states: list[Gathering] = []

    def open(self) -> Gather:
        self._states.append(Gathering(self._containers.objects, self._states))
        self._opened.append(self._states[-1])
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
        state.guard(test)
        return True

    def entry(self, item: Any) -> Any:
        if self._states:
            self._states[-1].add(item)
        return item

    def done(self, made: list[Any]) -> Any:
        """The list, of Python or of the worker."""
        state = self._states.pop()
        self._opened.pop()
        state.unwind(0)
        if state.list is None:
            return made
        self._containers.note(state.list)
        return state.list

    def generated(self, made: Iterator[Any]) -> Any:
        """The generator, or what it makes where it runs over a value or one decides that."""
        if self._states[-1].list is None and not self._states[-1].eager:
            self._states.pop()
            self._opened.pop()
            return made
        found = self.done(list(made))
        return iter(found) if type(found) is list else found


class Gathering:
    """One evaluation of a comprehension."""

    def __init__(self, objects: Objects, states: list[Gathering]) -> None:
        self.list: Value | None = None
        self.eager = False
        self._objects, self._states = objects, states
        self._stacks: list[ExitStack] = []  # of the conditionals and loops that are open
        self._entries: list[Any] = []

    def decided_by(self, value: Value) -> None:
        if self.list is None:
            self.list = value.recorder.record(LIST, *self._entries)

    def add(self, item: Any) -> None:
        if self.list is None:
            self._entries.append(item)
        else:
            self.list.append(item)

    def guard(self, test: Value) -> None:
        self._stacks.append(opened(test.recorder.record(IF, test)))
        self._objects.open(test.recorder)

    def plain(self, items: Any) -> Iterator[Any]:
        depth = len(self._stacks)
        for item in items:
            yield item
            self.unwind(depth)

    def recorded(self, over: Over) -> Iterator[Any]:
        depth = len(self._stacks)
        turn = Pass(over.source)
        self._stacks.append(turn.stack)
        self._objects.open(turn.recorder, loop=True)
        yield turn.item(over)
        self.unwind(depth + 1)
        self._stacks.pop()
        turn.end()
        self._objects.close()

    def unwind(self, depth: int, *, failed: bool = False) -> None:
        """Leave the conditionals that were opened since."""
        while len(self._stacks) > depth:
            self._stacks.pop().close()
            self._objects.close(failed=failed)

    def abandon(self) -> None:
        """An exception left it."""
        self.unwind(0, failed=True)
        self._states.remove(self)
