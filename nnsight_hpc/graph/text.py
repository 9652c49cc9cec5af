"""A graph as readable text, one node a line: ``%3 = Tensor.argmax(%2, dim=-1)    # experiment.py:12``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nnsight_hpc.graph.nodes import Device, DType, Ref, TensorRef

if TYPE_CHECKING:
    from nnsight_hpc.graph.nodes import Graph, Node


def as_text(graph: Graph) -> str:
    names = {node: name for name, node in graph.saves.items()}
    lines = [f"graph of {graph.model.id or 'a module'} ({graph.kind}, {len(graph.nodes)} nodes)"]
    lines += [_line(node, names.get(node.id)) for node in graph.nodes]
    return "\n".join(lines)


def _line(node: Node, saved_as: str | None) -> str:
    arguments = [_value(value) for value in node.args] + [f"{key}={_value(v)}" for key, v in node.kwargs.items()]
    text = f"%{node.id} = {node.op}({', '.join(arguments)})"
    notes = [f"saved as {saved_as}"] if saved_as else []
    notes += [f"{node.source.file}:{node.source.line}"] if node.source else []
    return f"{text:<60}  # {', '.join(notes)}" if notes else text


def _value(value: Any) -> str:
    if isinstance(value, Ref):
        return f"%{value.id}"
    if isinstance(value, TensorRef):
        return f"<{value.name}>"
    if isinstance(value, DType | Device):
        return value.name
    if isinstance(value, list):
        return f"[{', '.join(_value(item) for item in value)}]"
    if isinstance(value, tuple):
        return f"({', '.join(_value(item) for item in value)}{',' if len(value) == 1 else ''})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, slice):
        parts = [value.start, value.stop] + ([] if value.step is None else [value.step])
        return ":".join("" if part is None else _value(part) for part in parts)
    return "..." if value is ... else repr(value)
