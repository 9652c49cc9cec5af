"""The contexts: a trace is one forward of the model, a session several of them that run as one request."""

from __future__ import annotations

import sys
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from nnsight_hpc.graph.build import FORWARD
from nnsight_hpc.tracing.frames import users_line
from nnsight_hpc.tracing.recorder import Recorder
from nnsight_hpc.wire.errors import InvalidInput

if TYPE_CHECKING:
    from types import FrameType, TracebackType
    from typing import Self

    from nnsight_hpc.graph import Graph
    from nnsight_hpc.tracing.backend import Backend
    from nnsight_hpc.tracing.models import NNsight
    from nnsight_hpc.tracing.value import Value

_trace: ContextVar[Trace | None] = ContextVar("trace", default=None)
_session: ContextVar[Session | None] = ContextVar("session", default=None)


def current_trace(path: str) -> Trace:
    """The trace whose block is being recorded; raises `InvalidInput` outside of one."""
    trace = _trace.get()
    if trace is None:
        raise InvalidInput(
            f"{path or 'the model'} has values only while the model runs",
            where=str(users_line()),
            next="use it inside a `with model.trace(…):` block",
        )
    return trace


class _Request:
    """What a trace of its own and a session share: a recording that is run when the block ends."""

    def __init__(self, model: NNsight, backend: Backend, kind: str) -> None:
        self._model, self._backend, self._kind = model, backend, kind
        self.recorder = Recorder()
        self._graph: Graph | None = None

    @property
    def graph(self) -> Graph:
        """The recorded graph, once the block is over."""
        if self._graph is None:
            raise InvalidInput("the graph is there when the block is over")
        return self._graph

    def _run(self, frame: FrameType) -> None:
        self.recorder.close()
        self._graph = self.recorder.graph(frame, self._model.identity(remote=self._backend.remote), self._kind)
        results = self._backend.run(self._graph, self.recorder.tensors, self._model)
        self.recorder.bind(frame, self._graph, results)


class Session(_Request):
    """Several traces as one request; a value of an earlier trace is used in a later one without a round trip."""

    def __init__(self, model: NNsight, backend: Backend) -> None:
        super().__init__(model, backend, "session")

    def __enter__(self) -> Self:
        if _session.get() is not None or _trace.get() is not None:
            raise InvalidInput("a session cannot be opened inside another session or trace", where=str(users_line()))
        self._frame = sys._getframe(1)  # noqa: SLF001
        self._token = _session.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _tb: TracebackType | None
    ) -> None:
        _session.reset(self._token)
        frame, self._frame = self._frame, None
        if kind is None and frame is not None:
            self._run(frame)
        self.recorder.close()

    _frame: FrameType | None = None


class Trace(_Request):
    """One forward. `values` holds what stands at each point at this line of the block, by module path and kind."""

    def __init__(self, model: NNsight, backend: Backend, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__(model, backend, "trace")
        self._args, self._kwargs = args, kwargs
        self.values: dict[tuple[str, str], Any] = {}

    @property
    def graph(self) -> Graph:
        """The recorded graph, once the block is over; of a trace in a session, the session's."""
        return super().graph if self._session is None else self._session.graph

    def __enter__(self) -> Self:
        if _trace.get() is not None:
            raise InvalidInput(
                "a trace cannot be opened inside another one", where=str(users_line()), next="use a session"
            )
        self._session = _session.get()
        if self._session is not None:
            self.recorder = self._session.recorder
        self._frame = sys._getframe(1)  # noqa: SLF001
        self.forward: Value = self.recorder.record(FORWARD, *self._args, **self._kwargs)
        self._token = _trace.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _tb: TracebackType | None
    ) -> None:
        _trace.reset(self._token)
        frame, self._frame = self._frame, None
        if self._session is not None:
            return
        if kind is None and frame is not None:
            self._run(frame)
        self.recorder.close()

    _frame: FrameType | None = None
    _session: Session | None = None
