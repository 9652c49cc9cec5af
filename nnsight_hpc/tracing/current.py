"""The block that is being recorded, if any."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING

from nnsight_hpc.tracing.lines import users_line
from nnsight_hpc.wire.errors import InvalidInput

if TYPE_CHECKING:
    from nnsight_hpc.tracing.context import Session
    from nnsight_hpc.tracing.points import Points
    from nnsight_hpc.tracing.recorder import Recorder

trace_now: ContextVar[Points | None] = ContextVar("trace", default=None)
session_now: ContextVar[Session | None] = ContextVar("session", default=None)


def current_trace(path: str) -> Points:
    """The trace or edit whose block is being recorded; raises `InvalidInput` outside of one."""
    trace = trace_now.get()
    if trace is None:
        raise InvalidInput(
            f"{path or 'the model'} has values only while the model runs",
            where=str(users_line()),
            next="use it inside a `with model.trace(…):` block",
        )
    return trace


def current_recorder() -> Recorder | None:
    """What records the block that this is called in, if it is called in one."""
    block = trace_now.get() or session_now.get()
    return None if block is None else block.recorder
