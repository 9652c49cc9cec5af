"""Records one request: nodes in program order, the tensors they refer to, and which values are saved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from nnsight_hpc.graph import Device, DType, GraphBuilder, Ref, TensorRef
from nnsight_hpc.graph.build import SAVE
from nnsight_hpc.graph.nodes import map_leaves
from nnsight_hpc.tracing.frames import bind, named, users_line
from nnsight_hpc.tracing.value import Value
from nnsight_hpc.wire.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import FrameType

    from nnsight_hpc.graph import Graph
    from nnsight_hpc.wire.messages import ModelIdentity


class Recorder:
    """The state of a recording; closed once its block is over, and then the place where values find their results."""

    def __init__(self) -> None:
        self.builder = GraphBuilder()
        self.tensors: dict[str, torch.Tensor] = {}
        self.results: dict[int, Any] = {}
        self._open = True
        self._saves: list[int] = []

    def record(self, op: str, *args: Any, **kwargs: Any) -> Value:
        """Append a node for the line that the researcher is at; raises `InvalidInput` when the block is over."""
        source = users_line()
        if not self._open:
            raise InvalidInput(
                "the block that this value belongs to is over",
                where=str(source),
                why="a value that was not saved exists only while the model runs",
                next="keep it with .save() inside the block",
            )
        return Value(
            self, self.builder.append(op, map_leaves(args, self._leaf), map_leaves(kwargs, self._leaf), source)
        )

    def save(self, value: Value) -> int:
        """Keep `value` as it is at this line; returns the id of the save."""
        node = self.record(SAVE, value).node
        self._saves.append(node)
        return node

    def close(self) -> None:
        self._open = False

    def graph(self, frame: FrameType, model: ModelIdentity, kind: str) -> Graph:
        """The recorded graph, its saves named after the names that hold them in `frame`."""
        names: dict[int, str] = {}
        for name, value in named(frame, Value):
            if (save := self._save_of(value)) is not None:
                names.setdefault(save, name)
        saves: dict[str, int] = {}
        for node in self._saves:
            name = names.get(node, f"value_{node}")
            saves[name if name not in saves else f"{name}, {node}"] = node
        return self.builder.build(saves, model, kind)

    def bind(self, frame: FrameType, graph: Graph, results: Mapping[str, Any]) -> None:
        """Put the results in the place of the saved values, in the names of `frame` and in the values themselves."""
        self.results = {node: results[name] for name, node in graph.saves.items()}
        bind(frame, Value, lambda item: item if (save := self._save_of(item)) is None else self.results[save])

    def _save_of(self, value: Value) -> int | None:
        return value.saved if value.recorder is self else None

    def _leaf(self, leaf: Any) -> Any:
        """A value, tensor, dtype or device among the arguments of an operation as the graph holds it."""
        if type(leaf) is Value:
            if leaf.recorder is not self:
                return self._leaf(leaf.result())
            return Ref(leaf.node)
        if isinstance(leaf, torch.Tensor):
            return self._constant(leaf)
        if isinstance(leaf, torch.dtype):
            return DType(str(leaf).removeprefix("torch."))
        if isinstance(leaf, torch.device):
            return Device(str(leaf))
        if isinstance(leaf, range):
            return list(leaf)
        if hasattr(leaf, "__array__"):  # numpy: a number, or a tensor
            return leaf.item() if getattr(leaf, "ndim", 1) == 0 else self._constant(torch.as_tensor(leaf))
        return leaf

    def _constant(self, tensor: torch.Tensor) -> TensorRef:
        """The tensor by name, as it is now: a change that the researcher makes to it later in the block is not seen."""
        name = f"t{len(self.tensors)}"
        self.tensors[name] = tensor.detach().clone()
        return TensorRef(name)
