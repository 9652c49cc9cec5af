"""What reads and sets the model's values at its points: a function for each node, made once when the graph is compiled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from nnsight_hpc.execution.arguments import maker
from nnsight_hpc.execution.plain import within

if TYPE_CHECKING:
    from nnsight_hpc.execution.rows import Rows
    from nnsight_hpc.execution.run import Run
    from nnsight_hpc.execution.steps import Go
    from nnsight_hpc.execution.stops import Stop
    from nnsight_hpc.graph.nodes import Node
    from nnsight_hpc.graph.points import Point


def reading(number: int, stop: Stop, point: Point, part: tuple[int, int] | None) -> Go:
    """Reads what stands at the point that the model is at; of some rows of the batch, if `part` says which."""
    at, kind = stop.number, point.kind

    def read(run: Run, values: list[Any]) -> None:
        values[number] = run.moments[at].get(kind)

    def read_rows(run: Run, values: list[Any]) -> None:
        value, shared, rows = run.moments[at].get(kind), run.shared, _rows(run, point, part)
        note = shared.note_whole if shared.gradients else None
        values[number] = value if rows is None else rows.cut(value, note, shared.common)

    return read if part is None else read_rows


def setting(node: Node, stop: Stop, point: Point, part: tuple[int, int] | None, *, hands_over: bool) -> Go:
    """Sets what stands at the point that the model is at to the last argument of the node.

    `hands_over` says that this may be somebody else's memory, of which the model then gets a copy.
    """
    at, kind, given = stop.number, point.kind, maker(node.args[-1])

    def put(run: Run, _values: list[Any]) -> None:
        new, moment = given(run), run.moments[at]
        if not isinstance(new, torch.Tensor):
            within(new)
        run.last_set = node
        if hands_over:
            new = run.shared.weights.apart(new)
        rows = _rows(run, point, part)
        if rows is None:
            moment.set(kind, new)
        elif kind == "skip":
            moment.skip_rows(rows, new)  # type: ignore[attr-defined]
        else:
            moment.set(kind, rows.put(new, moment.get(kind)))

    return put


def _rows(run: Run, point: Point, part: tuple[int, int] | None) -> Rows | None:
    return None if part is None else run.batch[point.forward].part(*part, point)
