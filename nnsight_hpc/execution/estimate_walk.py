"""The memory of a graph, node by node on fake tensors in program order.

Counted are the graph's constants, the values that are still needed (views share their memory), lists and text among them,
what is saved, the largest step on the way to each value, and what the model holds on its way from one point to the next
(`Course`); with a backward pass everything before it is held. A run may do independent nodes in another order, and torch's
allocator keeps gaps: an estimate, not a promise.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch

from nnsight_hpc.execution.bounds import may_be_wrong
from nnsight_hpc.execution.estimate_budget import in_words
from nnsight_hpc.execution.estimate_course import Course
from nnsight_hpc.execution.estimate_guard import too_large
from nnsight_hpc.execution.estimate_objects import PER_ITEM, bytes_as_result, objects_in
from nnsight_hpc.execution.fake import UNKNOWN, Shadow
from nnsight_hpc.execution.fake_memory import storage_of
from nnsight_hpc.execution.fake_model import STEPS
from nnsight_hpc.execution.fake_tensors import objects_of
from nnsight_hpc.graph import build
from nnsight_hpc.graph.operations import PROTOCOL
from nnsight_hpc.graph.points import AT_A_MODULE, places_of
from nnsight_hpc.wire.errors import RequestCancelled

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence

    from nnsight_hpc.execution.fake_model import Place, Recording
    from nnsight_hpc.graph.nodes import Graph, Node
    from nnsight_hpc.graph.points import Point

ASSUMED_PASSES = 1024
"""So many passes a loop is taken to have whose number is not known before the run."""
_READS = frozenset({*build.READS.values(), build.RESULT})
_MODEL = build.FORWARDS | AT_A_MODULE
"""For these the model may be run on fakes, also with another batch: what that takes says nothing of the graph."""


class Ledger:
    """What is held in memory and by whom; a piece of memory that several hold counts once.

    Attributes
    ----------
    live
        Bytes held now.
    """

    def __init__(self) -> None:
        self.live = 0
        self._held: dict[int | None, list[Hashable]] = defaultdict(list)
        self._holders: dict[Hashable, int] = defaultdict(int)
        self._bytes: dict[Hashable, int] = {}

    def hold(self, owner: int | None, pieces: Mapping[Hashable, int]) -> None:
        """Let `owner` (a node; None: for good) hold pieces of memory, given with their bytes."""
        for piece, size in pieces.items():
            if not self._holders[piece]:
                self._bytes[piece] = size
                self.live += size
            self._holders[piece] += 1
            self._held[owner].append(piece)

    def drop(self, owner: int) -> None:
        """Let go of all that `owner` holds."""
        for piece in self._held.pop(owner, ()):
            self._holders[piece] -= 1
            if not self._holders[piece]:
                self.live -= self._bytes.pop(piece)
                del self._holders[piece]


class Walk:
    """One pass over the nodes of a graph."""

    def __init__(self, graph: Graph, tensors: Mapping[str, torch.Tensor], module: torch.nn.Module, budget: int) -> None:
        self._graph, self._tensors, self._budget = graph, tensors, budget
        self._shadow = Shadow(module, strict=False, values=True)
        self._twin = self._shadow.twin
        self._weights = frozenset(_pieces([*self._twin.module.parameters(), *self._twin.module.buffers()]))
        self._of_model: set[Hashable] = set()
        self._saved: list[Any] = []
        self._loops = {node.args[0].id for node in graph.nodes if node.op == build.END}
        self._points = places_of(graph, range(len(graph.nodes))).points
        self._touched: dict[int, set[Place]] = defaultdict(set)
        for point in self._points.values():
            self._touched[point.forward].add(_place(point))
        self._courses: dict[int, Course] = {}
        self._outputs: dict[Recording, Sequence[int]] = {}
        self._backward = any(node.op == build.BACKWARD for node in graph.nodes)
        self._ledger = Ledger()
        self._ledger.hold(None, {name: _size(tensor) for name, tensor in tensors.items()})

    def go(self, cancelled: Callable[[], bool] | None = None) -> tuple[int, frozenset[int]]:
        """The estimate in bytes, and the nodes whose sizes depend on data.

        Raises `InvalidGraph` at the first node that exceeds the budget, `RequestCancelled` when `cancelled` says so before a
        node, and what `Shadow.node` raises.
        """
        dropped_after = _dropped_after(self._graph)
        peak, unknown = self._ledger.live, set()
        for node in self._graph.nodes:
            if cancelled is not None and cancelled():
                raise RequestCancelled("the request was cancelled while its memory was estimated")
            before = self._ledger.live
            self._twin.mode.largest = 0
            value = self._shadow.node(node, self._tensors)
            way = self._of_forward(node) if node.op in build.FORWARDS else self._go_on(node, value)
            largest = 0 if node.op in _MODEL else self._twin.mode.largest
            self._count(node, value)
            needed = max(self._ledger.live, before + max(largest, way))
            if needed > self._budget:
                why = f"{in_words(before)} are held before it (constants, values still needed, what is saved)"
                raise too_large(node, needed, self._budget, why)
            peak = max(peak, needed)
            if (value is UNKNOWN and node.op not in PROTOCOL) or (
                self._twin.device.type == "cuda" and may_be_wrong(node)
            ):
                unknown.add(node.id)
            for done in dropped_after.get(node.id, ()):
                self._ledger.drop(done)
                self._shadow.forget(done)
        return peak, frozenset(unknown | self._varying())

    def _count(self, node: Node, value: Any) -> None:
        """Enter what a node has made."""
        if node.op in build.FORWARDS:
            return  # what it holds is counted at its points
        if node.op == build.SAVE:
            self._count_saved(node, value)
            return
        if node.op == build.APPEND:
            self._count_appended(node)
            return
        if node.op == build.COLLECT:
            each = sum(_pieces(self._shadow.value(node.args[1].id)).values())
            pieces: dict[Hashable, int] = {
                ("collected", node.id): each * self._passes(node.args[1].id) // self._passes(node.id)
            }
        elif node.op == "Tensor.tolist":
            listed = self._shadow.given(node.args[0], self._tensors)
            pieces = {("list", node.id): listed.numel() * PER_ITEM if isinstance(listed, torch.Tensor) else 0}
        else:
            pieces = {piece: size for piece, size in _pieces(value).items() if piece not in self._weights}
            if node.op in _READS:
                self._of_model.update(pieces)
            pieces |= objects_in(value)
        self._ledger.hold(node.id, pieces)

    def _count_saved(self, node: Node, value: Any) -> None:
        """What is saved stays. It is a copy where it is the model's, a small view of much, or of many passes."""
        pieces, size = _pieces(value), sum(map(_size, _tensors(value)))
        passes = self._passes(node.id)
        shared = self._weights | self._of_model
        if passes > 1 or not shared.isdisjoint(pieces) or sum(pieces.values()) > 2 * size:
            pieces = {("saved", node.id): size * passes}
        else:
            self._saved.append(value)  # its memory is known by where it lies, so that must not be given to others
        self._ledger.hold(None, {**pieces, ("result", node.id): bytes_as_result(value) * passes})

    def _count_appended(self, node: Node) -> None:
        container, value = node.args[0].id, self._shadow.value(getattr(node.args[1], "id", None))
        times = self._passes(node.id) // self._passes(container)
        pieces: Mapping[Hashable, int] = _pieces(value)
        if times > 1:
            pieces = {("appended", node.id): (sum(pieces.values()) + PER_ITEM) * times}
        self._ledger.hold(container, pieces)

    def _of_forward(self, node: Node) -> int:
        """The most that the model holds up to the last point that the graph touches."""
        passage = self._shadow.passage(node.id)
        if passage is None or passage.recording is None:
            return 0
        if self._backward and passage.recording not in self._outputs:
            self._outputs[passage.recording] = _outputs_until(passage.recording)
        footprint, outputs = self._twin.footprint(passage.call), self._outputs.get(passage.recording, ())
        course = Course(footprint, self._touched[node.id], further=_further_steps(node), outputs=outputs)
        self._courses[node.id] = course
        return course.whole()

    def _go_on(self, node: Node, value: Any) -> int:
        """Follow the model to the point where a node stands; the most that it holds on the way, beyond what it held before."""
        point = self._points.get(node.id)
        if point is None or point.forward not in self._courses:
            return 0
        course = self._courses[point.forward]
        way = course.to(_place(point), _pieces(value) if node.op in _READS else {})
        self._ledger.drop(point.forward)
        self._ledger.hold(point.forward, {("forward", point.forward): course.holds})
        return way

    def _passes(self, node: int) -> int:
        """How often a node runs: the product of the passes of the loops around it."""
        block, passes = self._graph.nodes[node].block, 1
        while block is not None:
            if block in self._loops:
                known = self._shadow.iterations(block)
                passes *= ASSUMED_PASSES if known is None else max(known, 1)
            block = self._graph.nodes[block].block
        return passes

    def _varying(self) -> set[int]:
        """The operations on what may have another form at a later pass of a loop."""
        varying = set(self._shadow.varying)
        if varying:
            for node in self._graph.nodes:
                if not varying.isdisjoint(node.refs()):
                    varying.add(node.id)
        return {node for node in varying if self._graph.nodes[node].op not in PROTOCOL}


def _place(point: Point) -> Place:
    """The place of a point as a `Recording` has it; the result of a generation is at no place, and so at its end."""
    kind = "inputs" if point.kind in ("input", "inputs") else "output"
    call = -1 if point.kind == "result" else point.call
    return (point.module.partition(":")[0], kind, call)


def _outputs_until(recording: Recording) -> list[int]:
    """For each place of a forward, in its order, the bytes of all outputs of modules up to there."""
    until: list[int] = []
    seen: set[Hashable] = set()
    bytes_ = 0
    for place, value in recording.points.items():
        if place[1] == "output":
            pieces = {piece: size for piece, size in _pieces(value).items() if piece not in seen}
            seen.update(pieces)
            bytes_ += sum(pieces.values())
        until.append(bytes_)
    return until


def _further_steps(node: Node) -> int:
    """The steps of a generation beyond those that are run on fakes."""
    tokens = node.kwargs.get("max_new_tokens", 0)
    return max(0, tokens - STEPS) if node.op == build.GENERATE and isinstance(tokens, int) else 0


def _dropped_after(graph: Graph) -> dict[int, list[int]]:
    """For each node the nodes whose values nothing needs any more once it has run."""
    ends = {node.args[0].id: node.id for node in graph.nodes if node.op == build.END}
    last = {node.id: node.id for node in graph.nodes}
    for node in graph.nodes:
        around = list(_around(graph, node))
        for ref in node.refs():
            until = max((ends.get(block, 0) for block in around if block > ref), default=0)
            last[ref] = max(last[ref], node.id, until)
    for node in graph.nodes:
        if node.op == build.INVOKE:  # points of an invoke are points of its forward
            last[node.args[0].id] = max(last[node.args[0].id], last[node.id])
    backward = max((node.id for node in graph.nodes if node.op == build.BACKWARD), default=0)
    dropped: dict[int, list[int]] = defaultdict(list)
    for node_id, until in last.items():
        dropped[max(until, backward)].append(node_id)
    return dropped


def _around(graph: Graph, node: Node) -> Iterator[int]:
    block = node.block
    while block is not None:
        yield block
        block = graph.nodes[block].block


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in objects_of(value) if isinstance(leaf, torch.Tensor)]


def _size(tensor: torch.Tensor) -> int:
    return int(tensor.numel() * tensor.element_size())


def _pieces(value: Any) -> dict[Hashable, int]:
    """The memory that the tensors in a nested value lie in, with its bytes."""
    return {storage_of(tensor): tensor.untyped_storage().nbytes() for tensor in _tensors(value)}
