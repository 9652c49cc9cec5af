"""What a graph is made of. All of it is immutable plain data; tensors are named here and lie beside the graph."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from nnsight_hpc.wire.messages import ModelIdentity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Ref:
    """The value of another node."""

    id: int


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor constant, by its name in the safetensors block that travels with the graph."""

    name: str


@dataclass(frozen=True, slots=True)
class DType:
    """A ``torch.dtype`` by its name without the module: ``float32``."""

    name: str


@dataclass(frozen=True, slots=True)
class Device:
    """A ``torch.device`` by its name. The worker reads any of them as the device of its model, but for ``cpu``."""

    name: str


@dataclass(frozen=True, slots=True)
class Seed:
    """A ``torch.Generator`` by its seed: the same numbers are drawn wherever the graph runs on the same kind of device."""

    number: int


@dataclass(frozen=True, slots=True)
class Held:
    """A Python object or function of the process that recorded the graph, by its number there. No document has one."""

    number: int


@dataclass(frozen=True, slots=True)
class Source:
    """The line of the user that made a node."""

    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}"


@dataclass(frozen=True, slots=True)
class Node:
    """One operation on constants and on values of earlier nodes.

    `args` and the values of `kwargs` are nested from None, bool, int, float, complex, str, slice, Ellipsis, list, tuple,
    dict with string keys, and the classes above. `block` is the id of the innermost conditional or loop that the node
    stands in.
    """

    id: int
    op: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    source: Source | None = None
    block: int | None = None

    def refs(self) -> Iterator[int]:
        """The ids of the nodes whose values this one uses, in the order of its arguments, with repetitions."""
        return refs_in((self.args, dict(self.kwargs)))


@dataclass(frozen=True, slots=True)
class Graph:
    """A recorded program: nodes in program order, and under which names which ``save`` nodes are returned.

    A graph that was recorded in this process has its tensor constants beside it; they are no part of its document.
    """

    nodes: tuple[Node, ...] = ()
    saves: Mapping[str, int] = field(default_factory=dict)
    model: ModelIdentity = field(default_factory=lambda: ModelIdentity(id=""))
    kind: str = "trace"
    tensors: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def to_json(self) -> str:
        """The document of this graph; the same program gives the same text."""
        from nnsight_hpc.graph.codec import dump_graph  # noqa: PLC0415 - codec is written in terms of these classes

        return dump_graph(self)

    @classmethod
    def from_json(cls, document: str | bytes) -> Graph:
        """Read a document. Raises `InvalidGraph` when its structure is not that of a graph; see also `validate`."""
        from nnsight_hpc.graph.codec import load_graph  # noqa: PLC0415

        return load_graph(document)

    def tensor_names(self) -> set[str]:
        """The names of all tensor constants that the graph refers to."""
        arguments = ((node.args, dict(node.kwargs)) for node in self.nodes)
        return {leaf.name for pair in arguments for leaf in leaves(pair) if isinstance(leaf, TensorRef)}

    def without_lines(self) -> Graph:
        """The same program, wherever it was written."""
        return replace(self, nodes=tuple(replace(node, source=None) for node in self.nodes))

    def draw(self, file: str | Path) -> Path:
        """Write a picture of this graph and return its path.

        The ending of `file` says which kind: ``.svg``, ``.png`` and ``.pdf`` need Graphviz; ``.dot`` needs nothing. Raises
        `NotFound` when Graphviz is not installed, with how to get it, and `InvalidInput` for other endings.
        """
        from nnsight_hpc.graph.draw import draw  # noqa: PLC0415

        return draw(self, file)

    def __str__(self) -> str:
        from nnsight_hpc.graph.text import as_text  # noqa: PLC0415

        return as_text(self)


def leaves(value: Any) -> Iterator[Any]:
    """Everything in a nested argument that is no container."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, slice):
        yield from leaves((value.start, value.stop, value.step))
    else:
        yield value


def refs_in(value: Any) -> Iterator[int]:
    """The ids of the nodes that a nested argument refers to, in its order, with repetitions."""
    return (leaf.id for leaf in leaves(value) if isinstance(leaf, Ref))


def map_leaves(value: Any, function: Callable[[Any], Any]) -> Any:
    """The same nesting with `function` applied to everything that is no container."""
    if isinstance(value, list):
        return [map_leaves(item, function) for item in value]
    if isinstance(value, tuple):
        return tuple(map_leaves(item, function) for item in value)
    if isinstance(value, dict):
        return {key: map_leaves(item, function) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(map_leaves(part, function) for part in (value.start, value.stop, value.step)))
    return function(value)
