"""What a block does as nodes in program order, with the tensors that they refer to."""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from nnsight_hpc.graph import Ref, TensorRef
from nnsight_hpc.graph.build import APPLY, FORWARDS, LOOP, GraphBuilder
from nnsight_hpc.graph.nodes import Node
from nnsight_hpc.tracing.constants import Constants
from nnsight_hpc.tracing.lines import users_line
from nnsight_hpc.tracing.pruning import Pruned
from nnsight_hpc.tracing.recall import Recall
from nnsight_hpc.tracing.value import Value
from nnsight_hpc.wire.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import FrameType

    import torch

_ANY_ARGUMENTS = FORWARDS | {APPLY}
"""What runs in this process with whatever Python object the researcher gives."""


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
    functions
        The Python functions that `tracer.apply` was given, by their number in the graph.
    shadow
        Under `scan` and `validate`: gives each node its fake value.
    """

    def __init__(self, *, remote: bool) -> None:
        self.builder = GraphBuilder()
        self.remote = remote
        self.functions: list[Callable[..., Any]] = []
        self.block: int | None = None
        self.points: dict[tuple[int, str, str, int], Value] = {}
        self.shadow: Any = None
        self._constants = Constants(attached=not remote)
        self._pruned = Pruned()
        self._recall: Recall | None = None
        self._node: Callable[..., Node] = Node
        self._open = True

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensor constants of the graph by name."""
        return self._constants.tensors

    def recall(self, frame: FrameType) -> None:
        """Use again what the block at `frame` recorded the last time, as far as it is the same."""
        self._recall = Recall(frame)
        self._node = self._recall.node

    def record(self, op: str, /, *args: Any, **kwargs: Any) -> Value:
        """Append a node for the line that the researcher is at; raises `InvalidInput` when the block is over."""
        return self.append(op, args, kwargs, self.block)

    def append(self, op: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], block: int | None) -> Value:
        """As `record`, in another block than the present one."""
        source = users_line()
        if not self._open:
            raise self._refused_after(args, str(source))
        encode = self._constants.encode
        other = self._any_leaf if op in _ANY_ARGUMENTS and not self.remote else self._leaf
        new = tuple([encode(a, other) for a in args])
        named = {key: encode(value, other) for key, value in kwargs.items()} if kwargs else {}
        nodes = self.builder.nodes
        node = self._node(len(nodes), op, new, named, source, block)
        nodes.append(node)
        value = self._value(node.id)
        if self.shadow is not None:
            self._cast(value, node)
        return value

    def replace(self, value: Value, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Give a node that is recorded already its arguments."""
        old = self.builder.nodes[value.node]
        other = self._leaf if self.remote else self._any_leaf
        new = self._constants.encode(args, other), self._constants.encode(dict(kwargs), other)
        self.builder.nodes[value.node] = self._node(old.id, old.op, *new, old.source, old.block)
        if self.shadow is not None:
            self.shadow.forget(value.node)
            value.fake = self.shadow.node(self.builder.nodes[value.node], self.tensors)

    def watch(self, module: torch.nn.Module) -> None:
        """From here on values have fakes; what is recorded already, too."""
        from nnsight_hpc.execution.fake import Shadow  # noqa: PLC0415 - fake tensors take a second to import

        self.shadow = Shadow(module)
        for node in self.builder.nodes:
            if node.id not in self._pruned:
                self.shadow.node(node, self.tensors)

    def copy(self, node: Node) -> int:
        """Append a node of another recording, its arguments being those of this one already; returns its id."""
        new = dataclasses.replace(node, id=len(self.builder.nodes))
        self.builder.nodes.append(new)
        if self.shadow is not None:
            self.shadow.node(new, self.tensors)
        return new.id

    def adopt(self, tensor: torch.Tensor) -> TensorRef:
        """A constant of another recording as one of this."""
        return self._constants.adopt(tensor)

    def number(self, function: Callable[..., Any]) -> int:
        """The number of a Python function in this recording."""
        if function not in self.functions:
            self.functions.append(function)
        return self.functions.index(function)

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
        self.points = {place: value for place, value in self.points.items() if value.node < start}

    def in_loop(self, node: Node) -> bool:
        """Whether a node stands in a loop."""
        block = node.block
        while block is not None and self.builder.nodes[block].op != LOOP:
            block = self.builder.nodes[block].block
        return block is not None

    def close(self) -> None:
        self._open = False

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
        return self._leaf(leaf) if type(leaf) is Value else leaf

    def _value(self, node: int) -> Value:
        """What stands for a node in the researcher's block."""
        raise NotImplementedError

    def _refused_after(self, args: tuple[Any, ...], source: str) -> InvalidInput:
        """The refusal of an operation when the block is over."""
        raise NotImplementedError
