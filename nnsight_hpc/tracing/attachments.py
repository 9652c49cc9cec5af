"""Modules of the researcher that hang in the envoy tree: called in a block, they are recorded as the operations they do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nnsight_hpc.tracing.current import current_trace
from nnsight_hpc.tracing.lines import users_line
from nnsight_hpc.wire.errors import InvalidInput

if TYPE_CHECKING:
    import torch


class Attachment:
    """A module that is not the model's own. Its parameters travel with a graph as constants."""

    def __init__(self, module: torch.nn.Module, path: str) -> None:
        self.module, self._path = module, path

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Record what the module does; where it does what cannot be recorded, it is called as a whole, in this process only."""
        trace = current_trace(self._path)
        recorder, start = trace.recorder, len(trace.recorder.builder.nodes)
        try:
            return self.module(*args, **kwargs)
        except Exception as error:
            if recorder.remote:
                raise InvalidInput(
                    f"{self._path} cannot be sent to a cluster",
                    where=str(users_line()),
                    why=f"it does what cannot be recorded: {error}",
                    next="write it with torch operations on values, or run the trace with remote=False",
                ) from error
            recorder.undo(start)
            return trace.apply(self.module, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def __repr__(self) -> str:
        return repr(self.module)
