"""A recording that runs when its block ends, here or elsewhere, at once or while the researcher goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nnsight_hpc.tracing.body import Body
from nnsight_hpc.tracing.lines import users_line
from nnsight_hpc.tracing.recorder import Recorder
from nnsight_hpc.tracing.tools import Tools
from nnsight_hpc.wire.errors import InvalidInput

if TYPE_CHECKING:
    from types import FrameType

    from nnsight_hpc.graph import Graph
    from nnsight_hpc.tracing.backend import Backend, Submitted
    from nnsight_hpc.tracing.models import NNsight


class Pending:
    """A submitted request: `result`, and all that the backend's own has (``id``, ``status()``, ``wait()``, ``cancel()``)."""

    def __init__(self, submitted: Submitted, recorder: Recorder, frame: FrameType) -> None:
        self._submitted, self._recorder = submitted, recorder
        self._frame: FrameType | None = frame
        recorder.pending = submitted.id

    def result(self, timeout: float | None = None) -> dict[str, Any]:
        """Wait for the saved values, bind the names that hold them in the block's frame, and return them by name."""
        results = self._submitted.result(timeout)
        if self._frame is not None:
            self._recorder.fill(results)
            self._recorder.bind(self._frame)
            self._frame = None
        return results

    def __getattr__(self, name: str) -> Any:
        return getattr(self._submitted, name)

    def __repr__(self) -> str:
        return repr(self._submitted)


class Request(Body, Tools):
    """What a trace of its own and a session share."""

    def __init__(self, model: NNsight, backend: Backend, kind: str, *, blocking: bool = True) -> None:
        if not blocking and not backend.remote:
            raise InvalidInput(
                "a trace in this process runs when its block ends",
                where=str(users_line()),
                next="blocking=False is for remote=True",
            )
        self.model, self._backend, self._kind, self._blocking = model, backend, kind, blocking
        self.recorder = Recorder(remote=backend.remote)
        self._graph: Graph | None = None
        self._pending: Pending | None = None

    @property
    def graph(self) -> Graph:
        """The recorded graph, once the block is over."""
        if self._graph is None:
            raise InvalidInput("the graph is there when the block is over", where=str(users_line()))
        return self._graph

    @property
    def request(self) -> Pending:
        """The request that was submitted with ``blocking=False``, once the block is over."""
        if self._pending is None:
            raise InvalidInput(
                "there is no request",
                why="blocking=False leaves one behind when its block ends",
                where=str(users_line()),
            )
        return self._pending

    def _run(self, frame: FrameType) -> None:
        """Run what was recorded, and bind the names of `frame` that hold saved values."""
        recorder = self.recorder
        recorder.finish()
        recorder.close()
        if recorder.refusal:
            raise recorder.refusal
        self._graph = recorder.graph(frame, self.model.identity(remote=self._backend.remote), self._kind)
        if not self._blocking:
            submitted = self._backend.submit(self._graph, recorder.tensors, self.model)
            self._pending = Pending(submitted, recorder, frame)
            return
        local = {"objects": recorder.objects} if recorder.objects else {}
        recorder.fill(self._backend.run(self._graph, recorder.tensors, self.model, **local))
        recorder.bind(frame)
