"""Conditionals and loops that are written as such: ``tracer.cond`` and ``session.iter``."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from nnsight_hpc.graph.build import ELSE, END, IF, ITEM, LOOP
from nnsight_hpc.tracing.lines import users_line
from nnsight_hpc.tracing.value import Value
from nnsight_hpc.wire.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import TracebackType
    from typing import Self

    from nnsight_hpc.tracing.recorder import Recorder


class _Body:
    """A block whose operations stand in a conditional or loop."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def _open(self, op: str, argument: Any) -> Value:
        opened = self._recorder.record(op, argument)
        self._stack = ExitStack()
        self._stack.enter_context(self._recorder.inside(opened))
        self._stack.enter_context(self._recorder.scope())
        return opened

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _tb: TracebackType | None
    ) -> None:
        self._stack.close()


class Cond(_Body):
    """``with tracer.cond(value) as c:`` runs its block when the value is true, ``with c.else_():`` when it is not."""

    def __init__(self, recorder: Recorder, condition: Any) -> None:
        super().__init__(recorder)
        self._condition = condition

    def __enter__(self) -> Self:
        self._if = self._open(IF, self._condition)
        return self

    def else_(self) -> _Else:
        return _Else(self._recorder, self._if)


class _Else(_Body):
    def __init__(self, recorder: Recorder, condition: Value) -> None:
        super().__init__(recorder)
        self._condition = condition

    def __enter__(self) -> Self:
        self._open(ELSE, self._condition)
        return self


class Loop(_Body):
    """``for x in session.iter(items):``, where the graph runs when `items` is a value, or else unrolled."""

    def __init__(self, recorder: Recorder, items: Value | Iterable[Any]) -> None:
        super().__init__(recorder)
        self._items = items

    def __enter__(self) -> Value:
        items = self._items if type(self._items) is Value else list(self._items)
        self._loop = self._open(LOOP, items)
        return self._recorder.record(ITEM, self._loop)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        super().__exit__(kind, error, tb)
        if kind is None:
            self._recorder.record(END, self._loop)

    def __iter__(self) -> Iterator[Any]:
        if type(self._items) is not Value:
            yield from self._items
            return
        line = users_line()
        try:
            with self as item:
                yield item
        except GeneratorExit:
            self._recorder.refusal = InvalidInput(
                "a loop over a value cannot be left by `break`",
                where=str(line),
                why="its length is known only where the graph runs",
                next="write `if` around what is to be left out",
            )
