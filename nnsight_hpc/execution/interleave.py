"""One forward of the model with the graph's nodes run at the points that they touch.

Only touched modules get hooks, and all hooks are gone when the forward is over, however it ends. Once no point is
outstanding the forward is left: what comes later in the model is not computed.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from itertools import count
from typing import TYPE_CHECKING, Any

import torch

from nnsight_hpc.execution.arguments import arguments_of
from nnsight_hpc.execution.batch import Batch
from nnsight_hpc.execution.failures import explained, in_the_model
from nnsight_hpc.execution.fake_model import Call
from nnsight_hpc.execution.locate import layers_of
from nnsight_hpc.execution.moments import After, Before, ShardedAfter, ShardedBefore
from nnsight_hpc.execution.plain import within
from nnsight_hpc.execution.source import SLOTS, instrumented
from nnsight_hpc.execution.stops import Stop, Visits
from nnsight_hpc.execution.view import ShardedPlace, Visit
from nnsight_hpc.graph.build import GENERATE
from nnsight_hpc.graph.nodes import Held, leaves

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nnsight_hpc.execution.arguments import Given
    from nnsight_hpc.execution.moments import Moment
    from nnsight_hpc.execution.rows import Rows
    from nnsight_hpc.execution.run import Run
    from nnsight_hpc.execution.steps import Go, Step
    from nnsight_hpc.graph.nodes import Node


class Left(BaseException):
    """Leaves the forward early. Not an `Exception`: a model that catches those must not swallow it."""


def passing(forward: Node) -> Go:
    """Runs the model once for a forward, and everything that hangs on its points."""
    given = arguments_of(forward)
    whole = any(isinstance(leaf, Held) for leaf in leaves((forward.args, dict(forward.kwargs))))

    def go(run: Run, _values: list[Any]) -> None:
        Interleaver(run, forward.id, given, whole=whole).go()

    return go


class Interleaver:
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
        step = self._run.schedule.step_of(self._forward)
        args, kwargs = self.arguments(step)
        with ExitStack() as stack:
            stack.callback(self._changes.undo)
            self.attach(Call(tuple(args), kwargs, step.node.op == GENERATE), stack)
            if self._run.shared.cancelled is not None:
                self._ask_before_layers()
            try:
                if self._whole or self.left_to_see():
                    self.returned(self._call(step, args, kwargs))
            except Left:
                pass
        self.leave()

    def _ask_before_layers(self) -> None:
        """Ask whether the run is cancelled also where the graph does not look: a generation may take minutes."""

        def ask(*_: Any) -> None:
            if not self._elsewhere():
                self._run.stop_if_cancelled()

        for layer in layers_of(self._run.shared.module):
            self._put_before(layer, ask)

    def attach(self, call: Call, stack: ExitStack) -> None:
        """Put the hooks on the model, which is about to be called; all of them are undone by the run's changes and `stack`."""
        run = self._run
        view, divided = run.shared.view, self._forward in run.schedule.divided
        if view is not None:
            view.prepare(call, self._operations)
        if divided:
            run.batch[self._forward] = self._batch(call)
        for path, operations in self._modules.items():
            self._hook(path, operations, stack)

    def returned(self, output: Any) -> None:
        """The model has come to its end."""
        if result := self._visits.get("", _NONE).result.get(0):
            self._fire(self._leaving(self._place("", "output"), result, output), result)
        self._run.end_of_forward(self._stops)

    def leave(self) -> None:
        """The hooks are gone: what nothing depends on that is seen outside is left out."""
        if not self.left_to_see():
            self._run.leave_forward(self._stops)

    @property
    def _operations(self) -> frozenset[str]:
        """The operations inside of forwards that are touched: ``path.of.module:operation``."""
        return frozenset(f"{path}:{name}" for path, names in self._modules.items() for name in names)

    def _batch(self, call: Call) -> Batch:
        """The batch of a call; that of a generation changes from step to step."""
        module, operations = self._run.shared.module, self._operations
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

    def arguments(self, step: Step) -> tuple[tuple[Any, ...], dict[str, Any]]:
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

    def left_to_see(self) -> bool:
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
            self._put_before(module, self._before(path, visits, skipped, rows))
        if visits.after or visits.instead:
            put(module._forward_hooks, next(_NUMBERS), self._after(path, visits, rows))  # noqa: SLF001

    def _put_before(self, module: torch.nn.Module, hook: Callable[..., Any]) -> None:
        """Put a hook on what comes into a module, as in `_hook`; it gets keywords, too."""
        number, put = next(_NUMBERS), self._changes.put
        put(module._forward_pre_hooks_with_kwargs, number, True)  # noqa: SLF001
        put(module._forward_pre_hooks, number, hook)  # noqa: SLF001

    def _before(
        self, path: str, visits: Visits, skipped: list[Any], rows: list[tuple[Rows, Any]]
    ) -> Callable[..., Any]:
        calls, place, output = count(), self._place(path, "input"), self._place(path, "output")

        def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
            if self._elsewhere():
                return None
            call = next(calls)
            moment = self._entering(place, visits.before.get(call), args, kwargs)
            self._begin(visits, call, moment)
            skipped[:], rows[:] = [_own(output, value) for value in moment.skipped], moment.skipped_rows
            return moment.left if moment.changed else None

        return before

    def _after(self, path: str, visits: Visits, rows: list[tuple[Rows, Any]]) -> Callable[..., Any]:
        calls, stops, elsewhere, place = count(), visits.after, self._elsewhere, self._place(path, "output")

        def after(_: Any, _args: Any, output: Any) -> Any:
            if elsewhere():
                return None
            stop = stops.get(next(calls))
            if stop is None and not rows:
                return None
            moment = self._leaving(place, stop, output)
            while rows:
                part, value = rows.pop()
                moment.set("output", part.put(value, moment.get("output")))
            if stop is not None:
                self._fire(moment, stop)
            return moment.left if moment.changed else None

        return after

    def _operation(self, path: str, names: Sequence[str]) -> Callable[..., Any]:
        calls = {name: count() for name in names}
        places = {name: [self._place(f"{path}:{name}", side) for side in ("input", "output")] for name in names}

        def operation(name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._elsewhere():
                return function(*args, **kwargs)
            visits, call, (into, out) = self._visits[f"{path}:{name}"], next(calls[name]), places[name]
            moment = self._entering(into, visits.before.get(call), args, kwargs, within=True)
            self._begin(visits, call, moment)
            args, kwargs = moment.left
            made = _own(out, moment.skipped[0]) if moment.skipped else function(*args, **kwargs)
            stop = visits.after.get(call)
            after = self._leaving(out, stop, made, within=True)
            for rows, value in moment.skipped_rows:
                after.set("output", rows.put(value, after.get("output")))
            if stop:
                self._fire(after, stop)
            return after.left

        return operation

    def _place(self, path: str, side: str) -> ShardedPlace | None:
        """The place where something is sharded; None where nothing is."""
        view = self._run.shared.view
        return ShardedPlace(view, path, side) if view is not None and view.sharded(path, side) else None

    def _entering(
        self,
        place: ShardedPlace | None,
        stop: Stop | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        within: bool = False,
    ) -> Before:
        if place is None:
            return Before(args, kwargs, within=within)
        return ShardedBefore(self._visit(place, stop, (args, kwargs)), args, kwargs, within=within)

    def _leaving(self, place: ShardedPlace | None, stop: Stop | None, output: Any, *, within: bool = False) -> After:
        if place is None:
            return After(output, within=within)
        return ShardedAfter(self._visit(place, stop, output), output, within=within)

    def _visit(self, place: ShardedPlace, stop: Stop | None, local: Any) -> Visit:
        run = self._run
        saved = stop is not None and stop.number in run.schedule.only_saved and not run.shared.gradients
        return Visit(place, local, root_only=saved)

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
        if not self._whole and (not self._outstanding or (run.schedule.guarded and not self.left_to_see())):
            raise Left


def _own(place: ShardedPlace | None, value: Any) -> Any:
    """What a module that is skipped hands on."""
    return value if place is None else place.own(value)


_NONE = Visits()
_NUMBERS = count(-1, -1)
"""Of hooks; torch counts up from 0."""


def _replaceable(module: torch.nn.Module, skipped: list[Any], elsewhere: Callable[[], bool]) -> Callable[..., Any]:
    """A forward for a module that gives what is in `skipped`, if anything, instead of running; not for calls `elsewhere`."""
    forward = module.forward

    def instead(*args: Any, **kwargs: Any) -> Any:
        return skipped.pop() if skipped and not elsewhere() else forward(*args, **kwargs)

    return instead
