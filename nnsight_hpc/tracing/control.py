"""Conditionals and loops that are written as such: ``tracer.cond`` and ``session.iter``.

In a block that is rewritten they are what plain ``if`` and ``for`` are. Where the source cannot be had, what they would have to
do for names and objects of Python's is refused.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from nnsight_hpc.graph.build import ELSE, END, IF, ITEM, LOOP
from nnsight_hpc.tracing.block_merge import UNBOUND, same
from nnsight_hpc.tracing.block_objects import Objects
from nnsight_hpc.tracing.lines import users_line
from nnsight_hpc.tracing.value import Value
from nnsight_hpc.wire.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import FrameType, TracebackType
    from typing import Self

    from nnsight_hpc.tracing.recorder import Recorder


class Body:
    """A block whose operations stand in a conditional or loop.

    Attributes
    ----------
    sides
        What rewritten code knows of names that a conditional bound: what it is in its block, before it, and after both.
    """

    loop = False

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self._watch: _Watch | None = None
        self.sides: dict[str, tuple[Any, Any, Any]] = {}

    def open(self) -> Value:
        """Record in the block from here on; returns the node that opened it."""
        op, argument = self._opener()
        opened = self.recorder.record(op, argument)
        self._stack = ExitStack()
        self._stack.enter_context(self.recorder.inside(opened))
        self._stack.enter_context(self.recorder.scope())
        return opened

    def close(self) -> None:
        self._stack.close()

    def _opener(self) -> tuple[str, Any]:
        """The operation that opens the block, and on what."""
        raise NotImplementedError

    def watch(self, frame: FrameType) -> None:
        """The block runs as it is written, in the code of `frame`."""
        self._watch = _Watch(frame, self.recorder, loop=self.loop)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.end(failed=kind is not None)


class Cond(Body):
    """``with tracer.cond(value) as c:`` runs its block when the value is true, ``with c.else_():`` when it is not."""

    def __init__(self, recorder: Recorder, test: Any) -> None:
        super().__init__(recorder)
        self._test = test

    def _opener(self) -> tuple[str, Any]:
        return IF, self._test

    def open(self) -> Value:
        self.condition = super().open()
        return self.condition

    def __enter__(self) -> Self:
        self.open()
        self.watch(sys._getframe(1))  # noqa: SLF001 - the documented way to a caller's frame
        return self

    def else_(self) -> Else:
        return Else(self.recorder, self)


class Else(Body):
    """The other side of a conditional."""

    def __init__(self, recorder: Recorder, first: Cond) -> None:
        super().__init__(recorder)
        self.condition, self.sides = first.condition, first.sides

    def _opener(self) -> tuple[str, Any]:
        return ELSE, self.condition

    def __enter__(self) -> Self:
        self.open()
        self.watch(sys._getframe(1))  # noqa: SLF001
        return self


class Loop(Body):
    """``for x in session.iter(items):``, where the graph runs when `items` is a value, or else unrolled."""

    loop = True

    def __init__(self, recorder: Recorder, items: Value | Iterable[Any]) -> None:
        super().__init__(recorder)
        self.items = items

    def _opener(self) -> tuple[str, Any]:
        return LOOP, self.items if type(self.items) is Value else list(self.items)

    def __enter__(self) -> Value:
        return self._enter(sys._getframe(1))  # noqa: SLF001

    def _enter(self, frame: FrameType) -> Value:
        self._loop = self.open()
        self.watch(frame)
        return self.recorder.record(ITEM, self._loop)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        super().__exit__(kind, error, tb)
        if kind is None:
            self.recorder.record(END, self._loop)

    def __iter__(self) -> Iterator[Any]:
        if type(self.items) is not Value:
            yield from self.items
            return
        line = users_line()
        item = self._enter(sys._getframe(1))  # noqa: SLF001
        try:
            yield item
        except GeneratorExit:
            self.__exit__(None, None, None)
            self.recorder.refusal = InvalidInput(
                "a loop over a value cannot be left by `break` where its source cannot be read",
                where=str(line),
                why="its length is known only where the graph runs",
                next="write `if` around what is to be left out",
            )
        else:
            self.__exit__(None, None, None)


class _Watch:
    """What must not happen in a block that runs as it is written: names and objects of Python's that are changed."""

    def __init__(self, frame: FrameType, recorder: Recorder, *, loop: bool) -> None:
        self._frame, self._names = frame, dict(frame.f_locals)
        self._objects = Objects()
        self._objects.open(recorder, loop=loop)

    def end(self, *, failed: bool) -> None:
        self._objects.close(failed=failed, filled=True)
        for name, now in {} if failed else self._frame.f_locals.items():
            before = self._names.get(name, UNBOUND)
            if before is not UNBOUND and type(now) is not Value and not same(before, now):
                raise InvalidInput(
                    f"{name!r} is bound anew where a value decides, in a block whose source cannot be read",
                    where=str(users_line()),
                    why="the block is recorded once, before the model runs: it would have the new value in any case",
                    next="write the block in a file or notebook cell, without %%time and the like, or bind values to names",
                )
