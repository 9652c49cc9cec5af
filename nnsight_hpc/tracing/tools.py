"""What traces and sessions offer beside the model's points: conditionals, containers, log lines, Python functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nnsight_hpc.graph.build import APPLY, DICT, LIST, LOG
from nnsight_hpc.graph.nodes import leaves
from nnsight_hpc.tracing.control import Cond
from nnsight_hpc.tracing.lines import users_line
from nnsight_hpc.tracing.value import Value
from nnsight_hpc.wire.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from nnsight_hpc.tracing.recorder import Recorder


class Tools:
    """Operations of a block that need no module of the model."""

    recorder: Recorder

    def cond(self, condition: Any) -> Cond:
        """``with tracer.cond(value) as c:`` for what is to happen when the value is true, ``with c.else_():`` otherwise."""
        return Cond(self.recorder, condition)

    def list(self, items: Iterable[Any] = ()) -> Value:
        """A list that lives where the graph runs, for ``append`` and indexing."""
        return self.recorder.record(LIST, *items)

    def dict(self, items: Mapping[str, Any] | None = None, **others: Any) -> Value:
        """A dict that lives where the graph runs, for items that are set and read by name."""
        made = self.recorder.record(DICT, **others)
        for key, item in (items or {}).items():
            made[key] = item
        return made

    def log(self, *parts: Any) -> None:
        """Write a line, with the values as they are then, while the graph runs."""
        self.recorder.record(LOG, *[p if any(type(leaf) is Value for leaf in leaves(p)) else str(p) for p in parts])

    def apply(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Value:
        """Call any Python function on values while the graph runs, in this process only."""
        recorder = self.recorder
        if recorder.remote:
            raise InvalidInput(
                f"{getattr(function, '__name__', 'a function')} cannot be sent to a cluster",
                where=str(users_line()),
                why="only listed operations leave this process, never Python code",
                next="write it with torch operations on values, or run the trace with remote=False",
            )
        return recorder.record(APPLY, function, *args, **kwargs)

    def barrier(self, _participants: int = 0) -> Callable[[], None]:
        """Accepted for scripts written for nnsight; it orders nothing that the graph does not order already."""
        return lambda: None
