"""One forward of the model with the graph's nodes run at the points that they touch.

Only touched modules get hooks, and all hooks are gone when the forward is over, however it ends. Once no point is
outstanding the forward is left: what comes later in the model is not computed.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from itertools import count
from typing import TYPE_CHECKING, Any, Protocol

import torch

from nnsight_hpc.execution.arguments import arguments_of
from nnsight_hpc.execution.batch import Batch
from nnsight_hpc.execution.failures import explained, in_the_model
from nnsight_hpc.execution.fake_model import Call
from nnsight_hpc.execution.plain import within
from nnsight_hpc.execution.source import SLOTS, instrumented
from nnsight_hpc.execution.stops import Stop, Visits
from nnsight_hpc.graph.build import GENERATE
from nnsight_hpc.graph.nodes import Held, leaves, map_leaves

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nnsight_hpc.execution.arguments import Given
    from nnsight_hpc.execution.rows import Rows
    from nnsight_hpc.execution.run import Run
    from nnsight_hpc.execution.steps import Go, Step
    from nnsight_hpc.graph.nodes import Node


class _Left(BaseException):
    """Leaves the forward early. Not an `Exception`: a model that catches those must not swallow it."""


def unshared(value: Any) -> Any:
    """A value inside of a forward with lists and dicts of its own: those there may be the model's, and last."""
    return map_leaves(value, lambda leaf: leaf) if type(value) in (list, dict, tuple) else value


class Moment(Protocol):
    """What stands at the place that the model is at."""

    def get(self, kind: str) -> Any: ...
    def set(self, kind: str, value: Any) -> None: ...


class Before:
    """The arguments of a module that is about to run. ``input`` is the first positional one, or else the first keyword's."""

    __slots__ = ("_within", "args", "changed", "kwargs", "skipped", "skipped_rows")

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, within: bool = False) -> None:
        self.args, self.kwargs = args, kwargs
        self._within = within
        self.changed = False
        self.skipped: list[Any] = []
        self.skipped_rows: list[tuple[Rows, Any]] = []

    def get(self, kind: str) -> Any:
        if self._within and kind == "inputs":
            return unshared((self.args, self.kwargs))
        if kind == "inputs":
            return self.args, self.kwargs
        return self.args[0] if self.args else next(iter(self.kwargs.values()), None)

    def set(self, kind: str, value: Any) -> None:
        self.changed = True
        if kind == "skip":
            self.skipped = [value]
        elif kind == "inputs":
            self.args, self.kwargs = value
        elif self.args:
            self.args = (value, *self.args[1:])
        else:
            self.kwargs = {**self.kwargs, next(iter(self.kwargs)): value}

    def skip_rows(self, rows: Rows, value: Any) -> None:
        """Some rows skip the module: it runs for the others, and theirs is replaced in its output. If all do, nothing runs."""
        self.skipped_rows.append((rows, value))
        whole = rows.joined(sorted(self.skipped_rows, key=lambda part: part[0].start))
        if whole is not None:
            self.skipped, self.skipped_rows = [whole], []


class After:
    """The output of a module, or of an operation within one, that has just run."""

    __slots__ = ("_within", "changed", "output")

    def __init__(self, output: Any, *, within: bool = False) -> None:
        self.output, self._within = output, within
        self.changed = False

    def get(self, _kind: str) -> Any:
        return unshared(self.output) if self._within else self.output

    def set(self, _kind: str, value: Any) -> None:
        if value is None and not self._within:
            raise TypeError("the output of a module cannot be set to None: to torch that means unchanged")
        self.output, self.changed = value, True


def passing(forward: Node) -> Go:
    """Runs the model once for a forward, and everything that hangs on its points."""
    given = arguments_of(forward)
    whole = any(isinstance(leaf, Held) for leaf in leaves((forward.args, dict(forward.kwargs))))

    def go(run: Run, _values: list[Any]) -> None:
        _Interleaver(run, forward.id, given, whole=whole).go()

    return go


class _Interleaver:
    """The hooks of one forward, and what is outstanding in it.

    A `whole` one is not left early: the model may do something to an object of the researcher's that it is given (a cache).
    """

    def __init__(self, run: Run, forward: int, given: Callable[[Run], Given], *, whole: bool) -> None:
        self._run, self._forward, self._given, self._whole = run, forward, given, whole
        passage = run.schedule.stops.forwards[forward]
        self._visits, self._modules, self._stops = passage.visits, passage.modules, passage.stops
        self._outstanding = passage.observed
        self._thread = threading.get_ident()
        self._changes = run.shared.changes

    def go(self) -> None:
        run, step = self._run, self._run.schedule.step_of(self._forward)
        args, kwargs = self._arguments(step)
        with ExitStack() as stack:
            stack.callback(self._changes.undo)
            if self._forward in run.schedule.divided:
                call = Call(tuple(args), kwargs, step.node.op == GENERATE)
                run.batch[self._forward] = self._batch(call)
            for path, operations in self._modules.items():
                self._hook(path, operations, stack)
            try:
                if self._whole or self._left_to_see():
                    output = self._call(step, args, kwargs)
                    if result := self._visits.get("", _NONE).result.get(0):
                        self._fire(After(output), result)
                    run.end_of_forward(self._stops)
            except _Left:
                pass
        if not self._left_to_see():
            run.leave_forward(self._stops)

    def _batch(self, call: Call) -> Batch:
        """The batch of a call; that of a generation changes from step to step."""
        module = self._run.shared.module
        operations = frozenset(f"{path}:{name}" for path, names in self._modules.items() for name in names)
        batch = Batch(module, call, operations)
        if operations or any(visits.instead for visits in self._visits.values()):
            _ = batch.layouts  # learnt on a copy of the model, whose forwards are about to be replaced
        if call.generate:
            self._put_before(module, self._look(batch))
        return batch

    def _look(self, batch: Batch) -> Callable[..., None]:
        """A hook of the whole model that tells the batch of what the model is called with at each step."""

        def look(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._elsewhere():
                batch.look(args, kwargs)

        return look

    def _arguments(self, step: Step) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the model is called with: nothing that somebody else may read."""
        run = self._run
        try:
            args, kwargs = self._given(run)
            if step.needs:
                within((args, kwargs))
            if self._forward in run.schedule.exposed:
                args, kwargs = run.shared.weights.apart((args, dict(kwargs)))
        except (ValueError, RecursionError) as error:
            raise explained(step.node, (), {}, error) from None
        return args, kwargs

    def _left_to_see(self) -> bool:
        """Whether a stop is outstanding on which something depends that is seen outside."""
        past = self._run.past
        return any(stop.observed and not past[stop.number] for stop in self._stops)

    def _call(self, step: Step, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self._run.shared.module
        try:
            if step.node.op != GENERATE:
                return module(*args, **kwargs)
            kwargs = dict(kwargs)
            seed = kwargs.pop("seed", None)
            with torch.random.fork_rng(enabled=seed is not None):
                if seed is not None:
                    torch.manual_seed(seed)
                return module.generate(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - what the model raises is the user's to see
            raise in_the_model(step.node, self._run.last_set, module, args, kwargs, error) from None

    def _hook(self, path: str, operations: Sequence[str], stack: ExitStack) -> None:
        """Put hooks on one module, and on operations inside of its forward.

        Hooks go into the module's own tables: torch's handles, which do no more, take more time than the hooks do.
        """
        module, visits, put = self._run.shared.parts[path], self._visits.get(path, _NONE), self._changes.put
        if operations:
            for slot in SLOTS:
                self._changes.keep(vars(module), slot)
            stack.enter_context(instrumented(module, operations, self._operation(path, operations)))
        skipped, rows = [], []  # type: list[Any], list[tuple[Rows, Any]]
        if visits.instead:
            put(vars(module), "forward", _replaceable(module, skipped, self._elsewhere))
        if visits.before or visits.instead:
            self._put_before(module, self._before(visits, skipped, rows))
        if visits.after or visits.instead:
            put(module._forward_hooks, next(_NUMBERS), self._after(visits, rows))  # noqa: SLF001

    def _put_before(self, module: torch.nn.Module, hook: Callable[..., Any]) -> None:
        """Put a hook on what comes into a module, as in `_hook`; it gets keywords, too."""
        number, put = next(_NUMBERS), self._changes.put
        put(module._forward_pre_hooks_with_kwargs, number, True)  # noqa: SLF001
        put(module._forward_pre_hooks, number, hook)  # noqa: SLF001

    def _before(self, visits: Visits, skipped: list[Any], rows: list[tuple[Rows, Any]]) -> Callable[..., Any]:
        calls = count()

        def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
            if self._elsewhere():
                return None
            moment = Before(args, kwargs)
            self._begin(visits, next(calls), moment)
            skipped[:], rows[:] = moment.skipped, moment.skipped_rows
            return (moment.args, moment.kwargs) if moment.changed else None

        return before

    def _after(self, visits: Visits, rows: list[tuple[Rows, Any]]) -> Callable[..., Any]:
        calls, stops, elsewhere = count(), visits.after, self._elsewhere

        def after(_: Any, _args: Any, output: Any) -> Any:
            if elsewhere():
                return None
            stop = stops.get(next(calls))
            if stop is None and not rows:
                return None
            moment = After(output)
            while rows:
                part, value = rows.pop()
                moment.set("output", part.put(value, moment.output))
            if stop is not None:
                self._fire(moment, stop)
            return moment.output if moment.changed else None

        return after

    def _operation(self, path: str, names: Sequence[str]) -> Callable[..., Any]:
        calls = {name: count() for name in names}

        def operation(name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._elsewhere():
                return function(*args, **kwargs)
            visits, call, moment = self._visits[f"{path}:{name}"], next(calls[name]), Before(args, kwargs, within=True)
            self._begin(visits, call, moment)
            after = After(moment.skipped[0] if moment.skipped else function(*moment.args, **moment.kwargs), within=True)
            for rows, value in moment.skipped_rows:
                after.set("output", rows.put(value, after.output))
            if stop := visits.after.get(call):
                self._fire(after, stop)
            return after.output

        return operation

    def _begin(self, visits: Visits, call: int, moment: Before) -> None:
        """A module or operation is about to run: its inputs, and then whether it is skipped."""
        if stop := visits.before.get(call):
            self._fire(moment, stop)
        if stop := visits.instead.get(call):
            self._fire(moment, stop)

    def _elsewhere(self) -> bool:
        """Whether a hook fires for what is not this forward: a call that the graph makes, or another thread's forward."""
        return self._run.shared.in_call or threading.get_ident() != self._thread

    def _fire(self, moment: Moment, stop: Stop) -> None:
        """The model is at `stop`: run what waited for it, and leave the forward if nothing else waits."""
        run = self._run
        run.fire(moment, stop)
        self._outstanding -= stop.observed
        if not self._whole and (not self._outstanding or (run.schedule.guarded and not self._left_to_see())):
            raise _Left


_NONE = Visits()
_NUMBERS = count(-1, -1)
"""Of hooks; torch counts up from 0."""


def _replaceable(module: torch.nn.Module, skipped: list[Any], elsewhere: Callable[[], bool]) -> Callable[..., Any]:
    """A forward for a module that gives what is in `skipped`, if anything, instead of running; not for calls `elsewhere`."""
    forward = module.forward

    def instead(*args: Any, **kwargs: Any) -> Any:
        return skipped.pop() if skipped and not elsewhere() else forward(*args, **kwargs)

    return instead
