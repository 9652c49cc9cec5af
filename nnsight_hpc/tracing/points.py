"""Reading and setting what stands at the points of a model, as a trace records it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nnsight_hpc.graph.build import READS, RESULT, SETS, SKIP
from nnsight_hpc.tracing.lines import users_line
from nnsight_hpc.tracing.request import Request
from nnsight_hpc.tracing.value import NO_KEYWORDS
from nnsight_hpc.wire.errors import InvalidInput

if TYPE_CHECKING:
    from nnsight_hpc.tracing.backend import Backend
    from nnsight_hpc.tracing.models import NNsight
    from nnsight_hpc.tracing.value import Value


class Points(Request):
    """The part of a trace that knows where in the model, and at which call of its modules, a line of the block is.

    Attributes
    ----------
    where
        The forward, or the invoke, whose values the points have at this line.
    step
        The step of a generation that an ``iter`` block is at.
    optional
        It is no error when that step never comes.
    stopped
        The line of `stop`, once it was called.
    outer
        The conditional or loop of a session that the trace stands in.
    wheres
        The forwards and invokes of the trace.
    """

    def __init__(self, model: NNsight, backend: Backend, kind: str, *, blocking: bool = True) -> None:
        super().__init__(model, backend, kind, blocking=blocking)
        self.where: Value | None = None
        self.step: int | None = None
        self.optional = False
        self.stopped = ""
        self.outer: int | None = None
        self.wheres: list[int] = []
        self._later: dict[str, int] = {}

    @property
    def result(self) -> Value:
        """What the whole call of the model returns; of a generation, the tokens. In an invoke its rows."""
        return self.recorder.append(RESULT, (self._here("the result"),), {}, self._block())

    def stop(self) -> None:
        """End the forward here: nothing later of the model can be read or set in this trace."""
        if self.recorder.block != self.outer:
            raise InvalidInput(
                "whether the forward ends cannot depend on a value",
                where=str(users_line()),
                next="leave it out: a forward ends by itself where nothing later is needed",
            )
        self.stopped = str(users_line())

    def read(self, path: str, kind: str) -> Value:
        """What stands at a point of the model at this line."""
        where, recorder = self.where, self.recorder
        if where is None or self.stopped:
            where = self._here(path)
        call = self._call(path) if self._later else self.step or 0
        place = (where.node, path, kind, call)
        value = recorder.points.get(place)
        if value is None:
            options = self._options(call) if call or self.optional else NO_KEYWORDS
            block = recorder.block if recorder.block == self.outer else self._block()
            value = recorder.points[place] = recorder.append(READS[kind], (where, path), options, block, 4)
        return value

    def set(self, path: str, kind: str, new: Any) -> None:
        """Put `new` in the place of what stands at a point."""
        standing = self.recorder.points.get((self._here(path).node, path, kind, self._call(path)))
        if new is None or standing is not new:  # `m.output += 1` assigns what it changed already
            self._put(SETS[kind], path, new, ("output",) if kind == "output" else ("input", "inputs"))

    def skip(self, path: str, new: Any) -> None:
        """Do not run a module; `new` is its output."""
        self._put(SKIP, path, new, ("output",))

    def later(self, path: str, calls: int) -> None:
        """From here on the points of a module, and of those in it, are those of a later call."""
        self._later[path] = self._later.get(path, 0) + calls

    def leave(self) -> None:
        """The block of an invoke is over."""
        self.where = None
        self._later.clear()

    def _here(self, path: str) -> Value:
        if self.stopped:
            raise InvalidInput(
                f"{path or 'the model'} is not reached: the trace was stopped before",
                where=str(users_line()),
                why=self.stopped,
            )
        if self.where is None:
            raise InvalidInput(
                f"{path or 'the model'} has no value here: the trace has no rows at this line",
                where=str(users_line()),
                next="use it in a `with tracer.invoke(…):` block; tracer.invoke() without inputs shows all rows",
            )
        return self.where

    def _call(self, path: str) -> int:
        call = self.step or 0
        for above, calls in self._later.items():
            if not above or path == above or path.startswith((f"{above}.", f"{above}:")):
                call += calls
        return call

    def _options(self, call: int) -> dict[str, Any]:
        options: dict[str, Any] = {"call": call} if call else {}
        return {**options, "optional": True} if self.optional else options

    def _block(self) -> int | None:
        """The block for a point of the model: the present one, or that around a loop, in which no model runs."""
        recorder = self.recorder
        return recorder.block if recorder.block == self.outer else recorder.outside_loops(self.outer)

    def _put(self, op: str, path: str, new: Any, stale: tuple[str, ...]) -> None:
        where, call = self._here(path), self._call(path)
        if self._block() != self.recorder.block:
            raise InvalidInput(
                f"{path or 'the model'} cannot be set in a loop that the graph runs",
                where=str(users_line()),
                why="the model passes each point once, and the loop as often as its values say",
                next="set it after the loop, or change its value in place",
            )
        self.recorder.append(op, (where, path, new), self._options(call), self.recorder.block)
        for kind in stale:
            for other in self.wheres:
                self.recorder.points.pop((other, path, kind, call), None)
