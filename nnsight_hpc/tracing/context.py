"""The contexts: a trace is one forward of the model, a session several of them that run as one request."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from nnsight_hpc.graph.build import FORWARD, GENERATE, INVOKE
from nnsight_hpc.tracing.batches import Batch, form_of, holds_objects, merge, own
from nnsight_hpc.tracing.cache import Cache
from nnsight_hpc.tracing.control import Loop
from nnsight_hpc.tracing.current import current_trace, session_now, trace_now
from nnsight_hpc.tracing.edits import replay
from nnsight_hpc.tracing.invokes import Invoke
from nnsight_hpc.tracing.iteration import Iterations, Steppings
from nnsight_hpc.tracing.lines import users_line
from nnsight_hpc.tracing.points import Points
from nnsight_hpc.tracing.request import Request
from nnsight_hpc.wire.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import FrameType
    from typing import Self

    from nnsight_hpc.graph import Graph
    from nnsight_hpc.tracing.backend import Backend
    from nnsight_hpc.tracing.models import NNsight
    from nnsight_hpc.tracing.value import Value

__all__ = ["Session", "Trace", "current_trace"]


class Session(Request):
    """Several traces as one request; a value of an earlier trace is used in a later one without a round trip."""

    def __init__(self, model: NNsight, backend: Backend, *, blocking: bool = True) -> None:
        super().__init__(model, backend, "session", blocking=blocking)

    def iter(self, items: Value | Iterable[Any]) -> Loop:
        """``for x in session.iter(items):``, where the graph runs if `items` is a value; traces may stand in it."""
        return Loop(self.recorder, items)

    def __enter__(self) -> Self:
        if session_now.get() is not None or trace_now.get() is not None:
            raise InvalidInput("a session cannot be opened inside another session or trace", where=str(users_line()))
        self._frame = sys._getframe(1)  # noqa: SLF001
        self.recorder.recall(self._frame)
        self._begin_block(self._frame)
        self._token = session_now.set(self)
        return self

    def _end(self, error: BaseException | None) -> None:
        session_now.reset(self._token)
        frame, self._frame = self._frame, None
        try:
            if error is None and frame is not None:
                self._run(frame)
        finally:
            self.recorder.close()

    _frame: FrameType | None = None


class Trace(Points):
    """One forward or generation of the model, or several where the inputs of its invokes differ in length."""

    def __init__(
        self,
        model: NNsight,
        backend: Backend,
        inputs: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        op: str = FORWARD,
        scan: bool = False,
        run: bool = True,
        blocking: bool = True,
    ) -> None:
        super().__init__(model, backend, "trace", blocking=blocking)
        self._op, self._inputs, self._kwargs, self._scan, self._runs = op, inputs, kwargs, scan, run
        self._batches: list[Batch] = []
        self._batch: Batch | None = None
        self._caches: list[Cache] = []
        self._one_call, self._all_rows = False, ""

    @property
    def graph(self) -> Graph:
        """The recorded graph, once the block is over; of a trace in a session, the session's."""
        return super().graph if self._session is None else self._session.graph

    @property
    def steps(self) -> int | None:
        """How often the model runs at most, in a generation; None where that is not known."""
        steps: int | None = self._kwargs.get("max_new_tokens") if self._batch is None else self._batch.steps
        return steps

    @property
    def generates(self) -> bool:
        """Whether it is a generation."""
        return self._op == GENERATE

    def __enter__(self) -> Self:
        if trace_now.get() is not None:
            raise InvalidInput(
                "a trace cannot be opened inside another one", where=str(users_line()), next="use a session"
            )
        self._join_session()
        self._frame = sys._getframe(1)  # noqa: SLF001
        if self._session is None:
            self.recorder.recall(self._frame)
        self._start, self.outer = len(self.recorder.builder.nodes), self.recorder.block
        self._one_call = self.model.given(self._inputs, self._kwargs)
        if self._one_call:
            args, kwargs = self.model.prepare(self._op, self._inputs, self._kwargs)
            self._batch = self._begin(None, args, kwargs)
            self.where = self._batch.forward
        self._begin_block(self._frame)
        self._token = trace_now.set(self)
        return self

    def invoke(self, *inputs: Any, **kwargs: Any) -> Invoke:
        """``with tracer.invoke(inputs):`` adds rows to the batch; without inputs its values show all rows.

        Prompts of one length share a forward, and others run in turn, so that no invoke sees padding. Where an invoke without
        inputs, or a cache outside of invokes, shows all rows, there is one forward: prompts of unequal length are padded on
        the left, and the values of every invoke are as long as those of the longest prompt.
        """
        return Invoke(self, inputs, kwargs)

    @property
    def iter(self) -> Iterations:
        """``for step in tracer.iter[2:5]:`` later calls of the modules during a generation."""
        return Iterations(self)

    def all(self) -> Steppings:
        """Every step of a generation: ``tracer.iter[:]``."""
        return self.iter[:]

    def cache(
        self,
        modules: Iterable[Any] | None = None,
        *,
        include_inputs: bool = False,
        include_output: bool = True,
        device: Any = "cpu",
        dtype: Any = None,
    ) -> Cache:
        """Save what all modules, or those given as envoys or paths, return in this trace, as the model passed it on."""
        kinds = ("inputs",) * include_inputs + ("output",) * include_output
        cache = Cache(self, modules, kinds, device=device, dtype=dtype)
        self._caches.append(cache)
        return cache

    def join(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
        """Add the rows of an invoke, and return where its values are."""
        given = inputs, {**self._kwargs, **kwargs}
        args, keywords = own(self.model.prepare(self._op, *given), given, self.recorder)
        form, rows = form_of((args, keywords))
        self._batch = next((b for b in self._batches if form is not None and b.form == form), None)
        if self._batch is None:
            self._refuse_sharing()
            self._batch = self._begin(form, args, keywords)
        else:
            self._batch.parts.append((args, keywords))
            if self.recorder.shadow is not None:
                self.recorder.replace(self._batch.forward, *self._batch.inputs(self.recorder))
        if rows is None:
            return self._batch.forward
        start, self._batch.rows = self._batch.rows, self._batch.rows + rows
        where = self.recorder.append(INVOKE, (self._batch.forward, start, self._batch.rows), {}, self.outer, 4)
        self._batch.invokes.append(where)
        self.wheres.append(where.node)
        return where

    def _refuse_sharing(self) -> None:
        """Raise `InvalidInput` where another forward would get the objects that the trace was given for the one before."""
        if self._batches and holds_objects(self._kwargs):
            raise InvalidInput(
                "the invokes of this trace cannot share the objects that it was given",
                where=str(users_line()),
                why="invokes with objects run in turn, and each would see what the one before did to them",
                next="give each invoke its own: tracer.invoke(prompt, name=object)",
            )

    def all_rows(self) -> Value:
        """Where the values of all rows are: in the first forward, which gets the inputs of all invokes."""
        if not self._batches:
            raise InvalidInput(
                "the rows of all invokes are asked for, and there are none",
                where=str(users_line()),
                next="give the invoke inputs",
            )
        self._all_rows = str(users_line())
        self._refuse_padding()
        self._batch = self._batches[0]
        return self._batch.forward

    def _refuse_padding(self) -> None:
        """Raise `InvalidInput` where all rows are asked for, and it is known already that they cannot be one batch."""
        shown, alone = self.recorder.shadow is not None, any(batch.form is None for batch in self._batches)
        if self._all_rows and len(self._batches) > 1 and (shown or alone):
            why = "scan and validate show each value in its own length" if shown else "some inputs fit no others"
            raise self._no_batch(why, str(users_line()))

    def _merge(self) -> None:
        """All rows are asked for: make one forward of all."""
        try:
            self._batches = [merge(self._batches, self.recorder, self.model.padded)]
        except InvalidInput as error:
            raise self._no_batch(error.why, self._all_rows) from None

    def _no_batch(self, why: str, where: str) -> InvalidInput:
        return InvalidInput(
            "the rows of all invokes are asked for, and their inputs cannot be one batch",
            where=where,
            why=why,
            next="give the inputs in one invoke; a list of prompts is padded on the left",
        )

    def _join_session(self) -> None:
        self._session = session_now.get()
        if self._session is not None:
            if self._session.model.origin is not self.model.origin:
                raise InvalidInput("a session runs on one model, and this is another", where=str(users_line()))
            self.recorder = self._session.recorder
        if self._scan and self.recorder.shadow is None:
            self.recorder.watch(self.model.origin.tree)

    def _begin(self, form: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch:
        """Record a new forward. One that invokes may share (it has a form) gets its inputs when all are known."""
        given = (args, kwargs) if form is None or self.recorder.shadow is not None else ((), {})
        forward = self.recorder.append(self._op, *given, self.outer, 4)
        self.wheres.append(forward.node)
        batch = Batch(forward, form)
        batch.parts.append((args, kwargs))
        self._batches.append(batch)
        if self.model.edits:
            replay(self.model.edits, self.recorder, batch)
        batch.nodes = range(forward.node, len(self.recorder.builder.nodes))
        self._refuse_padding()
        return batch

    def _end(self, error: BaseException | None) -> None:
        """The block is over: run what it recorded, unless it raised `error` or belongs to a session."""
        trace_now.reset(self._token)
        frame, self._frame = self._frame, None
        assert frame is not None, "a context is left once"
        try:
            if error is not None:
                self.recorder.drop(self._start)
            else:
                self._complete()
                if self._session is None:
                    self._run(frame)
        finally:
            self.recorder.points.clear()
            if self._session is None:
                self.recorder.close()

    def _complete(self) -> None:
        """Record what was waiting for the end of the block."""
        if not self._batches:
            raise InvalidInput(
                "the trace has no inputs",
                next="give them to model.trace(…), or open `with tracer.invoke(…):` in the block",
            )
        for cache in self._caches:
            cache.record()
        if self._all_rows and len(self._batches) > 1:
            self._merge()
        for batch in self._batches:
            if batch.form is not None and self.recorder.shadow is None:  # under scan it has them already
                self.recorder.replace(batch.forward, *batch.inputs(self.recorder))
        self.recorder.settle_gradients(self._start)

    def _run(self, frame: FrameType) -> None:
        if self._runs:
            super()._run(frame)
            return
        self.recorder.finish()
        self.recorder.close()
        self._graph = self.recorder.graph(frame, self.model.identity(remote=False), self._kind)
        self.recorder.bind(frame)

    _frame: FrameType | None = None
    _session: Session | None = None
