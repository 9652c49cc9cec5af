"""What a block does as nodes in program order, with the tensors that they refer to."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from nnsight_hpc.graph import Ref, TensorRef
from nnsight_hpc.graph.build import HOLDING, LOOP, GraphBuilder
from nnsight_hpc.graph.nodes import Held, Node
from nnsight_hpc.tracing.constants import Constants
from nnsight_hpc.tracing.lines import users_line
from nnsight_hpc.tracing.pruning import Pruned
from nnsight_hpc.tracing.recall import Recall, repeated
from nnsight_hpc.tracing.value import Value
from nnsight_hpc.wire.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import FrameType

    import torch

    from nnsight_hpc.graph.nodes import Source


class Recording:
    """Nodes that are appended line by line.

    Attributes
    ----------
    remote
        It runs in another process: Python functions and objects cannot go along.
    block
        The id of the innermost conditional or loop that is being recorded.
    points
        What stands at each point of the model at this line: ``(where, path, kind, call)``.
    objects
        The Python objects that forwards and `tracer.apply` were given, by their number in the graph.
    shadow
        Under `scan` and `validate`: gives each node its fake value.
    """

    def __init__(self, *, remote: bool) -> None:
        self.builder = GraphBuilder()
        self.remote = remote
        self.objects: list[Any] = []
        self.block: int | None = None
        self.points: dict[tuple[int, str, str, int], Value] = {}
        self.shadow: Any = None
        self._constants = Constants(attached=not remote)
        self._pruned = Pruned()
        self._recall: Recall | None = None
        self._before: tuple[Node, ...] = ()
        self._open = True

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensor constants of the graph by name."""
        return self._constants.tensors

    def recall(self, frame: FrameType) -> None:
        """Use again what the block at `frame` recorded the last time, as far as it is the same."""
        self._recall = Recall(frame)
        self._before = self._recall.nodes

    def record(self, op: str, /, *args: Any, **kwargs: Any) -> Value:
        """Append a node for the line that the researcher is at; raises `InvalidInput` when the block is over."""
        return self.append(op, args, kwargs, self.block)

    def append(
        self, op: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], block: int | None, depth: int = 3
    ) -> Value:
        """As `record`, in another block than the present one; the researcher's frame is `depth` up or further."""
        source, nodes = users_line(depth), self.builder.nodes
        number = len(nodes)
        if number < len(self._before) and repeated(self._before[number], op, args, kwargs, source, block, self):
            nodes.append(self._before[number])
        elif self._open:
            nodes.append(self._node(number, op, *self._encoded(op, args, kwargs), source, block))
        else:
            raise self._refused_after(args, str(source))
        value = Value(self, number)  # type: ignore[arg-type]  # a recorder is the only kind of recording
        if self.shadow is not None:
            self._cast(value, nodes[number])
        return value

    def replace(self, value: Value, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Give a node that is recorded already its arguments."""
        self.amend(value.node, *self._encoded(self.builder.nodes[value.node].op, args, kwargs))
        if self.shadow is not None:
            self.shadow.forget(value.node)
            value.fake = self.shadow.node(self.builder.nodes[value.node], self.tensors)

    def amend(self, number: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The same with arguments in the form that the graph holds."""
        old = self.builder.nodes[number]
        self.builder.nodes[number] = self._node(number, old.op, args, kwargs, old.source, old.block)

    def watch(self, module: torch.nn.Module) -> None:
        """From here on values have fakes; what is recorded already, too."""
        from nnsight_hpc.execution.fake import Shadow  # noqa: PLC0415 - fake tensors take a second to import

        self.shadow = Shadow(module)
        for node in self.builder.nodes:
            if node.id not in self._pruned:
                self.shadow.node(node, self.tensors)

    def copy(self, node: Node) -> int:
        """Append a node of another recording, its arguments being those of this one already; returns its id."""
        new = self._node(len(self.builder.nodes), node.op, node.args, node.kwargs, node.source, node.block)
        self.builder.nodes.append(new)
        if self.shadow is not None:
            self.shadow.node(new, self.tensors)
        return new.id

    def adopt(self, tensor: torch.Tensor, name: str = "") -> TensorRef:
        """A tensor that nobody else changes as a constant of this recording, under that name or the next one."""
        return self._constants.adopt(tensor, name)

    def kept(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the researcher's as it is now."""
        return self._constants.kept(tensor)

    def hold(self, thing: Any) -> Held:
        """A Python object as a constant of this recording, itself and not a copy."""
        numbers = [number for number, known in enumerate(self.objects) if known is thing]
        if not numbers:
            self.objects.append(thing)
        return Held(numbers[0] if numbers else len(self.objects) - 1)

    def undo(self, start: int) -> None:
        """Forget what was recorded from node `start` on; no value of it may be in use."""
        del self.builder.nodes[start:]
        self.points = {place: value for place, value in self.points.items() if value.node < start}

    @contextmanager
    def inside(self, value: Value) -> Iterator[None]:
        """What is recorded meanwhile stands in the conditional or loop that `value` opened."""
        before, self.block = self.block, value.node
        try:
            yield
        finally:
            self.block = before

    @contextmanager
    def scope(self) -> Iterator[None]:
        """What is read at a point meanwhile is not reused afterwards, nor what was read before and changed meanwhile."""
        before = dict(self.points)
        try:
            yield
        finally:
            self.points = {k: v for k, v in before.items() if self.points.get(k) is v}

    def outside_loops(self, inner: int | None) -> int | None:
        """The block around the outermost loop that the present block stands in, as far as it is inside of `inner`."""
        block = found = self.block
        while block is not None and block != inner:
            node = self.builder.nodes[block]
            if node.op == LOOP:
                found = node.block
            block = node.block
        return found

    def drop(self, start: int) -> None:
        """Take out what was recorded from node `start` on: its trace failed, and the recording goes on without it."""
        self._pruned.add(start, len(self.builder.nodes))
        self._before = ()  # its values may not be used again, which is not asked of a node that is as the last time
        self.points = {place: value for place, value in self.points.items() if value.node < start}

    def leave_out(self, nodes: range) -> None:
        """Take out nodes that nothing else uses any more."""
        self._pruned.add(nodes.start, nodes.stop)

    def in_loop(self, node: Node) -> bool:
        """Whether a node stands in a loop."""
        block = node.block
        while block is not None and self.builder.nodes[block].op != LOOP:
            block = self.builder.nodes[block].block
        return block is not None

    def close(self) -> None:
        self._open, self._before = False, ()

    def _node(  # noqa: PLR0917 - those of a node, in its order
        self,
        number: int,
        op: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        source: Source | None,
        block: int | None,
    ) -> Node:
        """The node with that number and content: the one of the last time, if it was the same."""
        if number < len(self._before) and repeated(self._before[number], op, args, kwargs, source, block, self):
            return self._before[number]
        return Node(number, op, args, kwargs, source, block)

    def _encoded(
        self, op: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a node as the graph holds them."""
        encode = self._constants.encode
        other = self._any_leaf if op in HOLDING and not self.remote else self._leaf
        return tuple([encode(a, other) for a in args]), {key: encode(value, other) for key, value in kwargs.items()}

    def _cast(self, value: Value, node: Node) -> None:
        """Compute the fake value of a new node; one that cannot be computed is not recorded."""
        try:
            value.fake = self.shadow.node(node, self.tensors)
        except BaseException:
            self.builder.nodes.pop()
            raise

    def _leaf(self, leaf: Any) -> Any:
        """A value among the arguments of an operation as the graph holds it; raises `InvalidInput` for what it cannot hold."""
        if type(leaf) is Value:
            if leaf.recorder is not self:
                return self._constants.encode(leaf.result(), self._leaf)
            if leaf.node in self._pruned:
                raise InvalidInput(
                    "this value belongs to a trace whose block raised an error",
                    where=str(users_line()),
                    why="that trace is not part of the session any more",
                )
            return Ref(leaf.node)
        raise InvalidInput(
            f"an object of type {type(leaf).__name__} cannot be recorded",
            where=str(users_line()),
            why="a graph holds numbers, strings, slices, tensors, dtypes, devices, and lists, tuples and dicts of them",
            next="tracer.apply(function, …) calls any Python function, in this process only",
        )

    def _any_leaf(self, leaf: Any) -> Any:
        return self._leaf(leaf) if type(leaf) is Value else self.hold(leaf)

    def _refused_after(self, args: tuple[Any, ...], source: str) -> InvalidInput:
        """The refusal of an operation when the block is over."""
        raise NotImplementedError
