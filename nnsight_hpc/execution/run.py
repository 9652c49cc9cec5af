"""Runs a graph on a model: nodes between the forwards here, nodes within a forward from its hooks (`interleave`)."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Any

import torch

from nnsight_hpc.execution.failures import explained, never_reached, too_late
from nnsight_hpc.execution.gradients import attached, run_backward
from nnsight_hpc.execution.interleave import Before, Moment, run_forward
from nnsight_hpc.execution.locate import find_module
from nnsight_hpc.execution.order import check_order
from nnsight_hpc.execution.plain import within
from nnsight_hpc.execution.points import SETTERS
from nnsight_hpc.execution.resolve import carry_out, constant
from nnsight_hpc.execution.rows import Rows
from nnsight_hpc.execution.shared import Shared
from nnsight_hpc.execution.special import SPECIAL
from nnsight_hpc.execution.structure import scheduled
from nnsight_hpc.execution.values import Absent, NotReached
from nnsight_hpc.graph.build import (
    APPEND,
    APPLY,
    BACKWARD,
    CALL,
    COLLECT,
    END,
    FINAL,
    LOG,
    MERGE,
    SAVE,
    SETS,
    SKIP,
)
from nnsight_hpc.graph.nodes import Graph, Node, Ref, TensorRef, map_leaves
from nnsight_hpc.graph.operations import IN_PLACE
from nnsight_hpc.wire.errors import InvalidGraph, RequestCancelled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from nnsight_hpc.execution.estimate import Guard
    from nnsight_hpc.execution.loops import Loop
    from nnsight_hpc.execution.points import Point
    from nnsight_hpc.execution.schedule import Schedule
    from nnsight_hpc.execution.steps import Step
    from nnsight_hpc.execution.stops import Stop

_EFFECTS = IN_PLACE | SETTERS | {BACKWARD}
"""What must not be left out in silence when it gets a value that was never made."""
_WALK = frozenset({*SETS.values(), SKIP, SAVE, MERGE, LOG, CALL, APPLY})
"""What walks through nested lists, which may be endless although they are small."""
_NOT_RUN = Absent("its block was not run")
_TAKE_ABSENT = frozenset({MERGE, SAVE, APPEND, END, FINAL, COLLECT, LOG})


def run_graph(
    graph: Graph,
    tensors: Mapping[str, torch.Tensor],
    module: torch.nn.Module,
    *,
    cancelled: Callable[[], bool] | None = None,
    log: Callable[[str, str], None] = lambda line, _source: print(line),
    functions: Sequence[Callable[..., Any]] = (),
    guard: Guard | None = None,
) -> dict[str, Any]:
    """Run `graph` on `module` and return what it saves, by name; `Absent` for what was never made.

    The module is as before afterwards, also after an error: no hook stays. Gradients are off unless the graph, or one of
    its tensors, needs them.

    Parameters
    ----------
    tensors
        The graph's tensor constants by name, on any device.
    cancelled
        Asked at each touched point of the model and between nodes; None where nobody cancels.
    log
        Called with each line that the graph logs, and the user's line that does so.
    functions
        Python functions of the caller that the graph calls by their number; without them such a call is refused.
    guard
        Asked before operations whose results' sizes were not known when the memory of the graph was estimated.

    Raises
    ------
    InvalidGraph
        The graph is refused before the model runs, or names a module that the model does not have.
    ExecutionFailed
        An operation raised; also an instance of that exception's own type. It shows the user's line.
    RequestCancelled
        `cancelled` said so.
    """
    schedule = scheduled(graph, local=bool(functions))
    if missing := sorted(schedule.tensors - tensors.keys()):
        raise InvalidGraph(
            f"the tensor {missing[0]!r} of the graph is missing", why="it is not among the tensors given"
        )
    gradients = schedule.gradients or any(tensor.requires_grad for tensor in tensors.values())
    with torch.set_grad_enabled(gradients):
        shared = Shared(module, tensors, cancelled, log, functions, gradients)
        run = Run(schedule, shared, guard)
        check_order(schedule, shared.tensors, module)
        run.go()
    return {name: run.saved.get(node, _NOT_RUN) for name, node in graph.saves.items()}


class Run:
    """The state of one run: which nodes are ready, and the values that are still needed.

    Parameters
    ----------
    guard
        As in `run_graph`.
    given
        For the body of a loop: the values that come from outside.
    """

    def __init__(
        self, schedule: Schedule, shared: Shared, guard: Guard | None = None, given: Mapping[int, Any] | None = None
    ) -> None:
        self.schedule = schedule
        self.shared: Shared = shared
        self.given: Mapping[int, Any] = given or {}
        self._guard = guard
        self.values: dict[int, Any] = {}
        self.saved: dict[int, Any] = {}
        self.done = bytearray(len(schedule.steps))
        self.batch: dict[int, tuple[int, int | None]] = {}
        self.past = bytearray(schedule.stops.count)
        """Which stops need not be waited for any longer."""
        self._moments: dict[int, Moment] = {}
        self._steps: Any = schedule.steps
        self._waits = list(schedule.waits)
        self._uses = list(schedule.uses)
        self._ready = list(schedule.first)
        self._never: dict[int, Absent] = {}
        self._absents = False
        self._careful = shared.cancelled is not None or guard is not None or bool(schedule.guarded)
        """Whether there is more to a node than to run it: it may be cancelled, checked or left out."""
        self._in_backward = False
        self.last_set: Node | None = None
        """The last change of what the model goes on with."""
        for path, node in schedule.parts.items():
            shared.parts[path] = find_module(shared.module, path, node)

    def go(self) -> None:
        """Run everything; forwards one after the other, each after what it needs."""
        self.run_ready()
        for forward in self.schedule.forwards:
            step = self.schedule.step_of(forward)
            if self._waits[forward] > 1:
                raise never_reached(step.node, self.schedule, self.done)
            if absent := self._why_absent(step):
                self._leave_out(self.schedule.stops.forwards[forward].stops, absent)
            else:
                run_forward(self, forward)
            self.finish(step, None)
            self.run_ready()
        for node_id in self.schedule.here:
            if not self.done[node_id]:
                raise never_reached(self.schedule.step_of(node_id).node, self.schedule, self.done)

    def run_ready(self) -> None:
        """Run what can run now, in program order."""
        ready, later = self._ready, []
        while ready:
            step = self._steps[heapq.heappop(ready)]
            if self._in_backward and step.node.op == BACKWARD:
                later.append(step.node.id)  # one backward after the other
            else:
                self._run(step)
        if later:
            ready += later

    def fire(self, moment: Moment, stop: Stop) -> None:
        """The model is at `stop`: run what waited for it; raises `InvalidGraph` where what must happen now cannot."""
        number, done = stop.number, self.done
        self._moments[number] = moment
        if stop.kinds and self.shared.gradients:
            for kind in stop.kinds:
                moment.set(kind, attached(moment.get(kind)))
        self.past[number] = 1
        never = self._never
        for node in stop.nodes:
            if node not in never:
                self._release(node)
        self.run_ready()
        del self._moments[number]
        for node in stop.must:
            if not done[node]:
                raise too_late(self.schedule.step_of(node).node, stop.points[0], self.schedule, done)

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

    def arguments(self, step: Step) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The node's arguments with values in place of references; the forward that a point belongs to is left out."""
        values = self.values
        if step.flat is None:
            args = self.resolved(step.args)
        else:
            args = tuple([values[value] if is_node else value for is_node, value in step.flat])
        return args, step.kwargs if step.constant else self.resolved(step.kwargs)

    def own_arguments(self, step: Step) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same for a forward, which may write into its inputs: it gets copies of the graph's constants."""
        given: tuple[tuple[Any, ...], dict[str, Any]] = within(map_leaves((step.args, step.kwargs), self._own_leaf))
        return given

    def _own_leaf(self, leaf: Any) -> Any:
        value = self._leaf(leaf)
        return value.clone() if isinstance(leaf, TensorRef) and not value.requires_grad else value

    def resolved(self, argument: Any) -> Any:
        """A nested argument of a node with values in place of references."""
        return map_leaves(argument, self._leaf)

    def finish(self, step: Step, value: Any) -> None:
        """Keep the value of a node while it is used, drop those that it used last, and release who waits for it."""
        node, uses = step.node, self._uses
        if uses[node.id]:
            self.values[node.id] = value
        for ref in step.needs:
            uses[ref] -= 1
            if not uses[ref]:
                del self.values[ref]
        if self._careful or isinstance(value, Absent):
            self._note(node, value)
        self.done[node.id] = 1
        for later in step.then:
            self._release(later)

    def _note(self, node: Node, value: Any) -> None:
        """Take in what a value says about others: it is absent, or decides that a block is not run."""
        if isinstance(value, Absent):
            self._absents = self._careful = True
        if node.id in self.schedule.guarded and value is not True:
            self._drop(node.id)

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

    def _leaf(self, leaf: Any) -> Any:
        if isinstance(leaf, Ref):
            return self.values[leaf.id]
        if isinstance(leaf, TensorRef):
            return self.shared.tensors[leaf.name]
        return constant(leaf, self.shared.device)

    def _run(self, step: Step) -> None:
        if self._careful and self._left_out(step):
            return
        if step.reads and step.stop is not None:
            self.finish(step, self._moments[step.stop.number].get(step.reads))
            return
        args, kwargs = self.arguments(step)
        try:
            if self._guard is not None and step.node.id in self._guard.unchecked:
                self._guard.check(step.node, args, kwargs)
            if step.writes:
                self.shared.weights.refuse_change(step.node, args[0])
            function = step.function
            value = self._special(step, args, kwargs) if function is None else function(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - whatever a user's operation raises is theirs to see
            raise explained(step.node, args, kwargs, error) from None
        self.finish(step, value)

    def _left_out(self, step: Step) -> bool:
        """Whether a node is not run, but absent; raises `RequestCancelled` when nothing is to be run any longer."""
        node, shared = step.node, self.shared
        if shared.cancelled is not None and shared.cancelled():
            raise RequestCancelled("the request was cancelled while it ran")
        absent = self._why_absent(step) if node.block is not None or self._absents or self._never else None
        if absent is None:
            return False
        if node.op == SAVE:
            self.saved[node.id] = absent
        self.finish(step, absent)
        return True

    def _why_absent(self, step: Step) -> Absent | None:
        """Why a node has no value: its block is not run, its point never came, or it uses what was never made."""
        node = step.node
        if node.block is not None and (taken := self.values[node.block]) is not True:
            return taken if isinstance(taken, Absent) else self._untaken(node.block)
        if node.id in self._never:
            return self._never[node.id]
        if node.op in _TAKE_ABSENT:
            return None
        used = (self.values.get(ref) for ref in step.needs)
        absent = next((value for value in used if isinstance(value, Absent)), None)
        if absent and node.op in _EFFECTS and not isinstance(absent, NotReached):
            raise explained(node, (), {}, ValueError(f"it uses a value that was never made: {absent.why}"))
        return absent

    def _special(self, step: Step, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Carry out an operation of the protocol, or one that depends on the device of the model."""
        node = step.node
        if node.op in _WALK and (len(args) != 1 or not isinstance(args[0], torch.Tensor)):
            within((args, kwargs))
        if step.stop is not None:
            return self._at_point(step.stop, step, args)
        if special := SPECIAL.get(node.op):
            return special(self, node, args, kwargs)
        return carry_out(node.op, args, kwargs, self.shared.device)

    def _at_point(self, stop: Stop, step: Step, args: tuple[Any, ...]) -> Any:
        """Read what stands at the point that the model is at just now, or set it to the last of `args`."""
        node = step.node
        point = self.schedule.places.points[node.id]
        moment = self._moments[stop.number]
        rows = self._rows(node.id, point) if self.schedule.places.rows else None
        if node.op not in SETTERS:
            value = moment.get(point.kind)
            return value if rows is None else rows.cut(value, self.shared.note_whole if self.shared.gradients else None)
        self.last_set = node
        new = self.shared.weights.apart(args[1]) if step.hands_over else args[1]
        if rows is None:
            moment.set(point.kind, new)
        elif isinstance(moment, Before) and point.kind == "skip":
            moment.skip_rows(rows, new)
        else:
            moment.set(point.kind, rows.put(new, moment.get(point.kind)))
        return None

    def _rows(self, node: int, point: Point) -> Rows | None:
        """Which rows a node sees; None for all."""
        part = self.schedule.places.rows.get(node)
        if part is None:
            return None
        batch, tokens = self.batch[point.forward]
        if part[1] > batch:
            raise ValueError(f"the invoke has rows up to {part[1]}, and the batch has {batch}")
        return None if part == (0, batch) else Rows(*part, batch, tokens)

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
