"""Runs a graph on a model: nodes between the forwards here, nodes within a forward from its hooks (`interleave`)."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Any

import torch

from nnsight_hpc.execution.failures import explained, never_reached
from nnsight_hpc.execution.interleave import Moment, run_forward
from nnsight_hpc.execution.locate import find_module, find_parameter
from nnsight_hpc.execution.memory import Weights, apart, memory_of
from nnsight_hpc.execution.resolve import constant, function_of
from nnsight_hpc.execution.schedule import Schedule, changes_the_model, compile_graph, point_of
from nnsight_hpc.execution.values import kept
from nnsight_hpc.graph.build import CALL, FORWARD, PARAMETER, READS, SAVE, SETS
from nnsight_hpc.graph.nodes import Graph, Node, Ref, TensorRef, map_leaves
from nnsight_hpc.graph.operations import IN_PLACE
from nnsight_hpc.graph.validation import validate
from nnsight_hpc.wire.errors import InvalidGraph, RequestCancelled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

_AT_A_MODULE = frozenset({*READS.values(), *SETS.values()})


def run_graph(
    graph: Graph,
    tensors: Mapping[str, torch.Tensor],
    module: torch.nn.Module,
    *,
    cancelled: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Run `graph` on `module` and return what it saves, by name.

    The module is as before afterwards, also after an error: no hook stays. Gradients are off.

    Parameters
    ----------
    tensors
        The graph's tensor constants by name, on any device.
    cancelled
        Asked at each touched point of the model and between nodes.

    Raises
    ------
    InvalidGraph
        The graph is refused before the model runs, or names a module that the model does not have.
    ExecutionFailed
        An operation raised; also an instance of that exception's own type. It shows the user's line.
    RequestCancelled
        `cancelled` said so.
    """
    validate(graph)
    if missing := sorted(graph.tensor_names() - tensors.keys()):
        raise InvalidGraph(
            f"the tensor {missing[0]!r} of the graph is missing", why="it is not among the tensors given"
        )
    with torch.no_grad():
        return Run(compile_graph(graph), tensors, module, cancelled).go()


class Run:
    """The state of one run: which nodes are ready, and the values that are still needed."""

    def __init__(
        self,
        schedule: Schedule,
        tensors: Mapping[str, torch.Tensor],
        module: torch.nn.Module,
        cancelled: Callable[[], bool],
    ) -> None:
        self.schedule, self.module, self.nodes = schedule, module, schedule.graph.nodes
        self.device = next((p.device for p in module.parameters()), torch.device("cpu"))
        self._tensors = {name: tensor.to(self.device) for name, tensor in tensors.items()}
        self._cancelled = cancelled
        self._waits = [count + (point_of(n) is not None) for count, n in zip(schedule.waits, self.nodes, strict=True)]
        self._uses = list(schedule.uses)
        self._ready = [node.id for node in self.nodes if not self._waits[node.id] and node.op != FORWARD]
        self._saved: dict[int, Any] = {}
        self._changes = sum(node.op in IN_PLACE for node in self.nodes)
        self.weights = Weights(module, self._tensors.values())
        self.values: dict[int, Any] = {}
        self.done: set[int] = set()
        self.here: Moment | None = None
        self.in_call = False
        self._parts = {
            node.id: find_module(module, node) for node in self.nodes if node.op in _AT_A_MODULE or node.op == CALL
        }

    def go(self) -> dict[str, Any]:
        """Run everything; forwards in program order, each after what it needs."""
        self.run_ready()
        for forward in self.schedule.forwards:
            if self._waits[forward]:
                raise never_reached(self.nodes[forward], self.schedule, self.done)
            run_forward(self, forward)
            self.finish(self.nodes[forward], None)
            self.run_ready()
        for node in self.nodes:
            if node.id not in self.done:
                raise never_reached(node, self.schedule, self.done)
        return {name: self._saved[node] for name, node in self.schedule.graph.saves.items()}

    def release(self, nodes: Iterable[int]) -> None:
        """One thing that each of `nodes` waited for has happened."""
        for node in nodes:
            self._waits[node] -= 1
            if not self._waits[node] and self.nodes[node].op != FORWARD:
                heapq.heappush(self._ready, node)

    def run_ready(self) -> None:
        """Run what can run now, in program order."""
        while self._ready:
            self._run(self.nodes[heapq.heappop(self._ready)])

    def check_cancelled(self) -> None:
        if self._cancelled():
            raise RequestCancelled("the request was cancelled while it ran")

    def arguments(self, node: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The node's arguments with values in place of references; the forward that a point belongs to is left out."""
        given = node.args[1:] if node.op in _AT_A_MODULE else node.args
        return map_leaves(given, self._leaf), map_leaves(dict(node.kwargs), self._leaf)

    def finish(self, node: Node, value: Any) -> None:
        """Keep the value of `node` while it is used, drop those that it used last, and release who waits for it."""
        if self._uses[node.id]:
            self.values[node.id] = value
        for ref in set(node.refs()):
            self._uses[ref] -= 1
            if not self._uses[ref]:
                self.values.pop(ref, None)
        self._changes -= node.op in IN_PLACE
        self.done.add(node.id)
        self.release(self.schedule.then[node.id])

    def _leaf(self, leaf: Any) -> Any:
        if isinstance(leaf, Ref):
            return self.values[leaf.id]
        if isinstance(leaf, TensorRef):
            return self._tensors[leaf.name]
        return constant(leaf, self.device)

    def _run(self, node: Node) -> None:
        self.check_cancelled()
        args, kwargs = self.arguments(node)
        with explained(node, args, kwargs):
            value = self._carry_out(node, args, kwargs)
        self.finish(node, value)

    def _at_point(self, kind: str, new: tuple[Any, ...]) -> Any:
        """Read what stands at the point that the model is at just now, or set it to the one thing in `new`."""
        assert self.here is not None, "points are released only while the model is at them"
        if not new:
            return self.here.get(kind)
        self.here.set(kind, self.weights.apart(new[0]))
        return None

    def _carry_out(self, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if point := point_of(node):
            return self._at_point(point.kind, args[1:])
        if node.op == SAVE:
            shared = self._changes or node.id in self.schedule.copies or self.weights.hold(args[0])
            self._saved[node.id] = kept(args[0], copy=bool(shared))
            return self._saved[node.id]
        if node.op in IN_PLACE and self.weights.hold(args[0]):
            raise changes_the_model(node)
        if node.op == PARAMETER:
            return find_parameter(self.module, node)
        if node.op == CALL:
            return self._call(self._parts[node.id], args[1:], kwargs)
        return function_of(node.op)(*args, **kwargs)

    def _call(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a module of the model on a value; hooks of the running forward do not see this call.

        The result shares no memory with what went in, so that what is known of memory from the graph holds.
        """
        args, kwargs = self.weights.apart((args, kwargs))
        self.in_call = True
        try:
            return apart(self.weights.apart(module(*args, **kwargs)), memory_of((args, kwargs)))
        finally:
            self.in_call = False

    def part(self, node: int) -> torch.nn.Module:
        """The module that a node names."""
        return self._parts[node]
