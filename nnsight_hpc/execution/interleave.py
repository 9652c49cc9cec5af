"""One forward of the model with the graph's nodes run at the points that they touch.

Only touched modules get hooks, and all hooks are gone when the forward is over, however it ends. Once no point is
outstanding the forward is left: what comes later in the model is not computed.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any, Protocol

from nnsight_hpc.execution.failures import explained, too_late

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch
    from torch.utils.hooks import RemovableHandle

    from nnsight_hpc.execution.run import Run
    from nnsight_hpc.execution.schedule import Point


class _Left(BaseException):
    """Leaves the forward early. Not an `Exception`: a model that catches those must not swallow it."""


class Moment(Protocol):
    """What stands at the module that the forward is at."""

    def get(self, kind: str) -> Any: ...
    def set(self, kind: str, value: Any) -> None: ...


class _Before:
    """The arguments of a module that is about to run. ``input`` is the first positional one, or else the first keyword's."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs

    def get(self, kind: str) -> Any:
        if kind == "inputs":
            return self.args, self.kwargs
        return self.args[0] if self.args else next(iter(self.kwargs.values()), None)

    def set(self, kind: str, value: Any) -> None:
        if kind == "inputs":
            self.args, self.kwargs = value
        elif self.args:
            self.args = (value, *self.args[1:])
        else:
            self.kwargs = {**self.kwargs, next(iter(self.kwargs)): value}


class _After:
    """The output of a module that has just run."""

    def __init__(self, output: Any) -> None:
        self.output = output

    def get(self, _kind: str) -> Any:
        return self.output

    def set(self, _kind: str, value: Any) -> None:
        if value is None:
            raise TypeError("the output of a module cannot be set to None: to torch that means unchanged")
        self.output = value


def run_forward(run: Run, forward: int) -> None:
    """Run the model once for the forward node with that id, and everything that hangs on its points."""
    _Interleaver(run, run.schedule.forwards[forward]).run(forward)


class _Interleaver:
    """The hooks of one forward, and what is outstanding in it."""

    def __init__(self, run: Run, points: Sequence[Point]) -> None:
        self._run = run
        self._outstanding = len(points)
        self._thread = threading.get_ident()
        self._calls: Counter[str] = Counter()
        self._points: dict[str, list[Point]] = defaultdict(list)
        for point in points:
            self._points[point.module].append(point)

    def run(self, forward: int) -> None:
        handles: list[RemovableHandle] = []
        node = self._run.nodes[forward]
        args, kwargs = self._run.weights.apart(self._run.arguments(node))
        try:
            for path, points in self._points.items():
                module = self._run.part(self._run.schedule.at[points[0]][0])
                handles += self._hooks(module, path, points)
            if self._outstanding:
                with explained(node, args, kwargs):
                    self._run.module(*args, **kwargs)
        except _Left:
            pass
        finally:
            for handle in handles:
                handle.remove()
            self._run.here = None  # an operation may have failed at a point

    def _hooks(self, module: torch.nn.Module, path: str, points: list[Point]) -> Iterable[RemovableHandle]:
        def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
            if self._elsewhere():
                return None
            moment = _Before(args, kwargs)
            self._calls[path] += 1
            self._fire(moment, [p for p in points if p.kind != "output" and p.call == self._calls[path] - 1])
            return moment.args, moment.kwargs

        def after(_: Any, _args: Any, output: Any) -> Any:
            if self._elsewhere():
                return None
            moment = _After(output)
            self._fire(moment, [p for p in points if p.kind == "output" and p.call == self._calls[path] - 1])
            return moment.output

        yield module.register_forward_pre_hook(before, with_kwargs=True)
        yield module.register_forward_hook(after)

    def _elsewhere(self) -> bool:
        """Whether a hook fires for what is not this forward: a call that the graph makes, or another thread's forward."""
        return self._run.in_call or threading.get_ident() != self._thread

    def _fire(self, moment: Moment, points: list[Point]) -> None:
        """The model is at `points`: run what waited for them, and leave the forward if nothing else waits."""
        if not points:
            return
        run, schedule = self._run, self._run.schedule
        run.here = moment
        run.release(sorted(node for point in points for node in schedule.at[point]))
        run.run_ready()
        run.here = None
        for point in points:
            for node in (*schedule.at[point], *schedule.due.get(point, ())):
                if node not in run.done:
                    raise too_late(run.nodes[node], point, schedule, run.done)
        self._outstanding -= len(points)
        if not self._outstanding:
            raise _Left
