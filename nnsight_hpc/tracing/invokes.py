"""Invokes: parts of one batch, each with its own rows."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from nnsight_hpc.tracing.body import Body
from nnsight_hpc.tracing.lines import users_line
from nnsight_hpc.wire.errors import InvalidInput

if TYPE_CHECKING:
    from typing import Self

    from nnsight_hpc.tracing.context import Trace


class Invoke(Body):
    """While its block is recorded, every point of the model shows the rows of its inputs only."""

    def __init__(self, trace: Trace, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._trace, self._inputs, self._kwargs = trace, inputs, kwargs

    def __enter__(self) -> Self:
        trace = self._trace
        if trace.where is not None:
            raise InvalidInput(
                "an invoke cannot be opened inside another one, or where the trace has its inputs already",
                where=str(users_line()),
                next="close the other one first, and give no inputs to model.trace()",
            )
        given = trace.model.given(self._inputs, self._kwargs)
        trace.where = trace.join(self._inputs, self._kwargs) if given else trace.all_rows()
        self._begin_block(sys._getframe(1))  # noqa: SLF001 - the documented way to a caller's frame
        return self

    def _end(self, _error: BaseException | None) -> None:
        self._trace.leave()
