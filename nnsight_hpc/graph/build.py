"""Building graphs: node by node while a block is recorded, or whole for captures of many points."""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING, Any

from nnsight_hpc.graph.nodes import Graph, Node, Ref, Source, TensorRef
from nnsight_hpc.wire.errors import InvalidInput, NotFound

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from nnsight_hpc.wire.messages import ModelIdentity

FORWARD = "model.forward"
READS = {"input": "model.input", "inputs": "model.inputs", "output": "model.output"}
SETS = {"input": "model.set_input", "inputs": "model.set_inputs", "output": "model.set_output"}
KIND_OF = {op: kind for table in (READS, SETS) for kind, op in table.items()}
"""What an operation reads or sets: ``input``, ``inputs`` or ``output``."""
PARAMETER = "model.parameter"
CALL = "model.call"
SAVE = "save"
GENERATE = "model.generate"
FORWARDS = frozenset({FORWARD, GENERATE})
INVOKE = "model.invoke"
SKIP = "model.skip"
RESULT = "model.result"
BACKWARD = "grad.backward"
READ_GRAD = "grad.read"
SET_GRAD = "grad.set"
IF = "control.if"
ELSE = "control.else"
MERGE = "control.merge"
LOOP = "control.loop"
ITEM = "control.item"
CARRIED = "control.carried"
NEXT = "control.next"
END = "control.end"
FINAL = "control.final"
COLLECT = "control.collect"
RANGE = "control.range"
LEAVE = "control.leave"
CHECK = "control.check"
REACHED = "control.reached"
LIST = "container.list"
DICT = "container.dict"
APPEND = "container.append"
LENGTH = "container.length"
LOG = "log"
APPLY = "local.apply"
HOLDING = FORWARDS | {APPLY}
"""Operations that take whatever Python object the researcher gives, in the process that recorded them."""


class GraphBuilder:
    """Nodes in the order in which they are added; the next id is their number."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []

    def add(self, op: str, *args: Any, source: Source | None = None, block: int | None = None, **kwargs: Any) -> int:
        """Append a node and return its id."""
        return self.append(op, args, kwargs, source, block)

    def append(
        self,
        op: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        source: Source | None,
        block: int | None = None,
    ) -> int:
        node = Node(len(self.nodes), op, args, kwargs, source, block)
        self.nodes.append(node)
        return node.id

    def build(self, saves: Mapping[str, int], model: ModelIdentity, kind: str = "trace") -> Graph:
        return Graph(tuple(self.nodes), dict(saves), model, kind)


def capture_graph(points: Mapping[str, str], model: ModelIdentity) -> Graph:
    """One forward over the tensor constants ``input_ids``, ``attention_mask`` and ``position_ids``.

    Parameters
    ----------
    points
        What to save under which name: ``{"layer3": "model.layers.3.output"}``.
    """
    builder = GraphBuilder()
    inputs = {name: TensorRef(name) for name in ("input_ids", "attention_mask", "position_ids")}
    forward = builder.append(FORWARD, (), {**inputs, "use_cache": False}, None)
    saves = {}
    for name, point in points.items():
        module, kind = split_point(point)
        value = builder.add(READS[kind], Ref(forward), module)
        saves[name] = builder.add(SAVE, Ref(value))
    return builder.build(saves, model, "capture")


def split_point(point: str) -> tuple[str, str]:
    """``model.layers.3.output`` as module path and ``output`` or ``input``; raises `InvalidInput`."""
    module, _, kind = point.rpartition(".")
    if kind not in ("input", "output"):
        raise InvalidInput(
            f"{point!r} is not a point of a model",
            why="it has to end in .output or .input",
            next=f"write {point}.output",
        )
    return module, kind


def expand_points(patterns: Iterable[str], module_paths: Iterable[str]) -> dict[str, str]:
    """The points that patterns name, in the order of the model: ``{"model.layers.0.output": same, …}``.

    ``*`` stands for any one part of a path. Raises `NotFound` with near names for a pattern that matches no module.
    """
    paths = list(module_paths)
    found: dict[str, str] = {}
    for pattern in patterns:
        module, kind = split_point(pattern)
        matches = re.compile(re.escape(module).replace(r"\*", r"[^.]+") + r"\Z").match
        points = [f"{path}.{kind}" if path else kind for path in paths if matches(path)]
        if not points:
            near = difflib.get_close_matches(module, paths, n=3, cutoff=0.5)
            raise NotFound(
                f"no module of the model matches {module!r}",
                where=pattern,
                next=f"did you mean {', '.join(near)}?" if near else "print(model) shows the modules",
            )
        found.update({point: point for point in points})
    return found
