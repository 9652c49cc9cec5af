"""The block that is being recorded, if any."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING

from nnsight_hpc.tracing.lines import users_line
from nnsight_hpc.wire.errors import InvalidInput

if TYPE_CHECKING:
    from nnsight_hpc.tracing.context import Session
    from nnsight_hpc.tracing.models import NNsight
    from nnsight_hpc.tracing.points import Points
    from nnsight_hpc.tracing.recorder import Recorder

trace_now: ContextVar[Points | None] = ContextVar("trace", default=None)
session_now: ContextVar[Session | None] = ContextVar("session", default=None)


def current_trace(path: str, model: NNsight | None = None) -> Points:
    """The trace or edit whose block is being recorded; raises `InvalidInput` outside of one, and in one of another model."""
    trace = trace_now.get()
    if trace is None:
        raise InvalidInput(
            f"{path or 'the model'} has values only while the model runs",
            where=str(users_line()),
            next="use it inside a `with model.trace(…):` block",
        )
    if model is not None and model is not trace.model:
        _check(path, model, trace.model)
    return trace


def current_recorder(model: NNsight) -> Recorder | None:
    """What records the block that this is called in, if it is called in one; raises `InvalidInput` in one of another model."""
    block = trace_now.get() or session_now.get()
    if block is None:
        return None
    _check("", model, block.model)
    return block.recorder


def _check(path: str, model: NNsight, running: NNsight) -> None:
    """Refuse what belongs to another model than the one that runs; edited copies, and wrappers of one module, are one model."""
    if model.tree is running.tree:
        return
    own, other = model.identity(remote=False).id, running.identity(remote=False).id
    raise InvalidInput(
        f"{path or 'the model'} belongs to another model than this block: to {own}, and the block runs "
        + (f"{other}" if own != other else f"another {other}"),
        where=str(users_line()),
        next="save its value in a trace of its own model, and use that here; its weights are in model.module",
    )
