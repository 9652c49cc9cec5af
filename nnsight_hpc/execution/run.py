"""Runs a graph on a model: nodes between the forwards here, nodes within a forward from its hooks (`interleave`)."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Any

import torch

from nnsight_hpc.execution.changes import Changes
from nnsight_hpc.execution.failures import explained, never_reached, too_late
from nnsight_hpc.execution.gradients import attached, run_backward
from nnsight_hpc.execution.locate import find_module
from nnsight_hpc.execution.order import check_order
from nnsight_hpc.execution.shared import Shared
from nnsight_hpc.execution.structure import scheduled
from nnsight_hpc.execution.values import Absent, NotReached
from nnsight_hpc.graph.build import (
    APPEND,
    BACKWARD,
    CHECK,
    COLLECT,
    END,
    FINAL,
    LOG,
    MERGE,
    NEXT,
    REACHED,
    SAVE,
)
from nnsight_hpc.graph.operations import IN_PLACE
from nnsight_hpc.graph.points import SETTERS
from nnsight_hpc.wire.errors import InvalidGraph, RequestCancelled

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from nnsight_hpc.execution.batch import Batch
    from nnsight_hpc.execution.estimate import Guard
    from nnsight_hpc.execution.loops import Loop
    from nnsight_hpc.execution.moments import Moment
    from nnsight_hpc.execution.schedule import Schedule
    from nnsight_hpc.execution.shared_guard import SharedGuard
    from nnsight_hpc.execution.steps import Step
    from nnsight_hpc.execution.stops import Stop
    from nnsight_hpc.execution.view import FullView
    from nnsight_hpc.graph.nodes import Graph, Node

_EFFECTS = IN_PLACE | SETTERS | {BACKWARD, CHECK}
"""What must not be left out in silence when it gets a value that was never made."""
_NOT_RUN = Absent("its block was not run")
_TAKE_ABSENT = frozenset({MERGE, SAVE, APPEND, END, FINAL, COLLECT, LOG, NEXT, REACHED})


def run_graph(
    graph: Graph,
    tensors: Mapping[str, torch.Tensor],
    module: torch.nn.Module,
    *,
    cancelled: Callable[[], bool] | None = None,
    log: Callable[[str, str], None] = lambda line, _source: print(line),
    objects: Sequence[Any] = (),
    guard: Guard | SharedGuard | None = None,
    view: FullView | None = None,
    only: Collection[str] | None = None,
) -> dict[str, Any]:
    """Run `graph` on `module` and return what it saves, by name; `Absent` for what was never made.

    The module is as before afterwards, also after an error: no hook stays. Gradients are off unless the graph, or one of
    its tensors, needs them.

    Parameters
    ----------
    tensors
        The graph's tensor constants by name, on any device.
    cancelled
        Asked before each layer of the model and between nodes; None where nobody cancels.
    log
        Called with each line that the graph logs, and the user's line that does so.
    objects
        Python objects and functions of the caller that the graph has by their number; without them it is refused.
    guard
        Asked before operations whose results' sizes were not known when the memory of the graph was estimated.
    view
        For a model that is spread over several processes, in all of which this is called: shows whole tensors. Where it keeps
        nothing the result is empty.
    only
        The names of what is kept here, where that is not all that the graph saves.

    Raises
    ------
    InvalidGraph
        The graph is refused before the model runs, or names a module that the model does not have.
    ExecutionFailed
        An operation raised; also an instance of that exception's own type. It shows the user's line.
    RequestCancelled
        `cancelled` said so.
    """
    schedule = complete(graph, tensors, local=bool(objects))
    gradients = schedule.gradients or any(tensor.requires_grad for tensor in tensors.values())
    changes, before = Changes(), torch.is_grad_enabled()
    try:
        with torch.set_grad_enabled(gradients):
            shared = Shared(module, tensors, cancelled, log, objects, gradients, changes, view)
            if only is not None:
                shared.unwanted = frozenset(graph.saves.values()).difference(graph.saves[name] for name in only)
            run = Run(schedule, shared, guard)
            check_order(schedule, shared.tensors, module)
            run.go()
    except BaseException:  # an interrupt may strike while things are cleared up: then what is left is cleared up here
        changes.undo()
        torch.set_grad_enabled(before)
        raise
    return run.saved_by(graph)


def complete(graph: Graph, tensors: Mapping[str, torch.Tensor], *, local: bool) -> Schedule:
    """The schedule of a graph whose tensors are all there; raises `InvalidGraph` where one is missing, and as `scheduled`."""
    schedule = scheduled(graph, local=local)
    if not schedule.tensors <= tensors.keys():
        missing = min(schedule.tensors - tensors.keys())
        raise InvalidGraph(f"the tensor {missing!r} of the graph is missing", why="it is not among the tensors given")
    return schedule


class Run:
    """The state of one run: which nodes are ready, and the values that are still needed.

    Parameters
    ----------
    guard
        As in `run_graph`.
    given
        For the body of a loop: the values that come from outside.

    Attributes
    ----------
    values
        Of each node, as long as it is used; else None.
    moments
        What stands at the stops that the model is at just now.
    past
        Which stops need not be waited for any longer.
    last_set
        The last change of what the model goes on with.
    """

    def __init__(
        self,
        schedule: Schedule,
        shared: Shared,
        guard: Guard | SharedGuard | None = None,
        given: Mapping[int, Any] | None = None,
    ) -> None:
        self.schedule: Schedule = schedule
        self.shared: Shared = shared
        self._guard = guard
        self.given: Mapping[int, Any] = given or {}
        self.values: list[Any] = [None] * len(schedule.steps)
        self.saved: dict[int, Any] = {}
        self.done = bytearray(schedule.not_here)
        self.batch: dict[int, Batch] = {}
        self.moments: dict[int, Moment] = {}
        self.past = bytearray(schedule.stops.count)
        self.last_set: Node | None = None
        self._waits, self._uses, self._ready = list(schedule.waits), list(schedule.uses), list(schedule.first)
        self._never: dict[int, Absent] = {}
        self._careful = bool(schedule.guarded)
        """Whether a node may have to be left out."""
        self._watched = shared.cancelled is not None or guard is not None
        """Whether there is more to ask before each node: the run may be cancelled, the node be too large."""
        self._in_backward = False
        for path, node in schedule.parts.items():
            shared.parts[path] = find_module(shared.module, path, node)

    def go(self) -> None:
        """Run everything; forwards one after the other, each after what it needs."""
        self.run_ready()
        for forward in self.schedule.forwards:
            step = self.schedule.step_of(forward)
            if self.begins(step):
                step.go(self, self.values)
            self.passed(step)
        self.check_done()

    def begins(self, step: Step) -> bool:
        """Whether the forward whose turn it is takes place; where it does not, what hangs on it is left out."""
        if self._waits[step.number] > 1:
            raise never_reached(step.node, self.schedule, self.done)
        absent = self._why_absent(step)
        if absent:
            self._leave_out(self.schedule.stops.forwards[step.number].stops, absent)
        return not absent

    def passed(self, step: Step) -> None:
        """A forward is over: what waited for that runs."""
        self._finish(step)
        self.run_ready()

    def check_done(self) -> None:
        """Raise `InvalidGraph` for what has not run although all forwards are over."""
        if 0 in self.done:
            raise never_reached(self.schedule.step_of(self.done.index(0)).node, self.schedule, self.done)

    def saved_by(self, graph: Graph) -> dict[str, Any]:
        """What the graph saves, by name, as far as this process keeps it."""
        kept = {name: node for name, node in graph.saves.items() if self.shared.keeps(node)}
        return {name: self.saved.get(node, _NOT_RUN) for name, node in kept.items()}

    def run_ready(self) -> None:
        """Run what can run now, in program order."""
        ready, steps, later = self._ready, self.schedule.steps, []
        while ready:
            step = steps[heapq.heappop(ready)]
            assert step is not None
            if self._in_backward and step.node.op == BACKWARD:
                later.append(step.number)  # one backward after the other
            else:
                self._run(step)
        if later:
            ready += later

    def fire(self, moment: Moment, stop: Stop) -> None:
        """The model is at `stop`: run what waited for it; raises `InvalidGraph` where what must happen now cannot."""
        number = stop.number
        if stop.kinds and self.shared.gradients:
            for kind in stop.kinds:
                moment.set(kind, attached(moment.get(kind)))
        self.moments[number], self.past[number] = moment, 1
        if (straight := self.schedule.straight[number]) and not self._careful:
            self._run_straight(straight)
        else:
            self._run_waiting(stop)
        del self.moments[number]

    def _run_straight(self, steps: Sequence[Step]) -> None:
        """Run what hangs on one stop alone."""
        values, done = self.values, self.done
        try:
            for step in steps:
                if self._watched:
                    self._watch(step)
                step.go(self, values)
                for end in step.ends:
                    values[end] = None
                done[step.number] = 1
        except Exception as error:  # noqa: BLE001 - whatever a user's operation raises is theirs to see
            raise explained(step.node, *step.arguments(self), error) from None

    def _run_waiting(self, stop: Stop) -> None:
        for node in stop.nodes:
            if node not in self._never:
                self._release(node)
        self.run_ready()
        for node in stop.must:
            if not self.done[node]:
                raise too_late(self.schedule.step_of(node).node, stop.points[0], self.schedule, self.done)

    def end_of_forward(self, stops: Iterable[Stop]) -> None:
        """A forward is over: what it did not come to, and need not come to, is absent."""
        optional = self.schedule.places.optional
        left = [stop for stop in stops if not self.past[stop.number] and optional.issuperset(stop.nodes)]
        self._leave_out(left, NotReached("the model did not come there"))

    def leave_forward(self, stops: Iterable[Stop]) -> None:
        """A forward was left: nothing that is seen outside depends on what it did not come to."""
        self._leave_out([stop for stop in stops if not self.past[stop.number]], NotReached("nothing later was needed"))

    def _leave_out(self, stops: Iterable[Stop], absent: Absent) -> None:
        for stop in stops:
            self.past[stop.number] = 1
            for node in stop.nodes:
                if node not in self._never:
                    self._careful = True
                    self._never[node] = type(absent)(f"{self.schedule.places.points[node]}: {absent.why}")
                    self._release(node)

    def _run(self, step: Step) -> None:
        if self._careful and (absent := self._why_absent(step)):
            self._note_absent(step, absent)
        else:
            try:
                if self._watched:
                    self._watch(step)
                step.go(self, self.values)
            except Exception as error:  # noqa: BLE001 - whatever a user's operation raises is theirs to see
                raise explained(step.node, *step.arguments(self), error) from None
        self._finish(step)

    def stop_if_cancelled(self) -> None:
        """Raise `RequestCancelled` when nothing is to be run any longer."""
        if self.shared.cancelled is not None and self.shared.cancelled():
            raise RequestCancelled("the request was cancelled while it ran")

    def _watch(self, step: Step) -> None:
        """Raise `RequestCancelled` when nothing is to be run any longer, and `InvalidGraph` where too much memory is taken."""
        self.stop_if_cancelled()
        guard = self._guard
        if guard is not None and guard.watch is not None:
            guard.watch.look(step.node)
        if guard is not None and step.number in guard.unchecked:
            guard.check(step.node, *step.arguments(self))

    def _finish(self, step: Step) -> None:
        """A node was run: drop the values that are not used any longer, and release who waits for it."""
        number, uses, values = step.number, self._uses, self.values
        value = values[number]
        if isinstance(value, Absent):
            self._careful = True
        if self._careful and number in self.schedule.guarded and value is not True:
            self._drop(number)
        if not uses[number]:
            values[number] = None
        for ref in step.needs:
            uses[ref] -= 1
            if not uses[ref]:
                values[ref] = None
        self.done[number] = 1
        for later in step.then:
            self._release(later)

    def _release(self, node: int) -> None:
        """One thing that `node` waited for has happened."""
        self._waits[node] -= 1
        if not self._waits[node]:
            heapq.heappush(self._ready, node)

    def _drop(self, block: int) -> None:
        """The block is not run: what in it waits for the model need not wait any longer."""
        for node in self.schedule.guarded[block]:
            stop = self.schedule.stops.of[node]
            if not self.past[stop.number] and node not in self._never:
                self._never[node] = self._untaken(block)
                if all(other in self._never for other in stop.nodes):
                    self.past[stop.number] = 1
                self._release(node)

    def _untaken(self, block: int) -> Absent:
        where = self.schedule.step_of(block).node.source
        return Absent(f"the block of {where} was not run" if where else "its block was not run")

    def _note_absent(self, step: Step, absent: Absent) -> None:
        self.values[step.number] = absent
        if step.node.op == SAVE:
            self.saved[step.number] = absent

    def _why_absent(self, step: Step) -> Absent | None:
        """Why a node has no value: its block is not run, its point never came, or it uses what was never made."""
        node = step.node
        if node.block is not None and (taken := self.values[node.block]) is not True:
            return taken if isinstance(taken, Absent) else self._untaken(node.block)
        if node.id in self._never:
            return self._never[node.id]
        if node.op in _TAKE_ABSENT:
            return None
        absent = next((value for ref in step.needs if isinstance(value := self.values[ref], Absent)), None)
        if absent and node.op in _EFFECTS and not isinstance(absent, NotReached):
            raise explained(node, (), {}, ValueError(f"it uses a value that was never made: {absent.why}"))
        return absent

    def run_body(self, loop: Loop, given: Mapping[int, Any]) -> Run:
        """One pass of a loop, with the values that come from outside of its body."""
        run = Run(loop.schedule, self.shared, self._guard and self._guard.within(loop.own), given)
        run.go()
        return run

    def differentiate(self, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A backward pass; another one that gets ready meanwhile waits for its end."""
        self._in_backward = True
        try:
            run_backward(self, node.id, args, kwargs)
        finally:
            self._in_backward = False
