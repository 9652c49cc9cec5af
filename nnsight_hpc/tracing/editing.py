"""``with model.edit() as edited:`` records what every later trace of the edited model begins with."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from nnsight_hpc.graph.build import FORWARD
from nnsight_hpc.tracing.backend import LocalBackend
from nnsight_hpc.tracing.current import session_now, trace_now
from nnsight_hpc.tracing.edits import EditRecorder
from nnsight_hpc.tracing.lines import users_line
from nnsight_hpc.tracing.points import Points
from nnsight_hpc.wire.errors import InvalidInput

if TYPE_CHECKING:
    from nnsight_hpc.tracing.models import NNsight


class Editing(Points):
    """The block of an edit: points of the model as in a trace, and nothing that runs."""

    steps = None
    recorder: EditRecorder

    def __init__(self, edited: NNsight) -> None:
        super().__init__(edited, LocalBackend(), "edit")
        self.recorder = EditRecorder()

    def __enter__(self) -> NNsight:
        if trace_now.get() is not None or session_now.get() is not None:
            raise InvalidInput("an edit cannot be recorded inside a trace or session", where=str(users_line()))
        self.where = self.recorder.record(FORWARD)
        self.wheres.append(self.where.node)
        self._begin_block(sys._getframe(1))  # noqa: SLF001 - the documented way to a caller's frame
        self._token = trace_now.set(self)
        return self.model

    def _end(self, error: BaseException | None) -> None:
        trace_now.reset(self._token)
        self.recorder.settle_gradients(0)
        self.recorder.close()
        if error is None:
            self.model.edits.append(self.recorder.edit())
