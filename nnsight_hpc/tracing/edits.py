"""Interventions that stay: recorded once, and recorded again at the beginning of every forward of the edited model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

from nnsight_hpc.graph import Ref, TensorRef
from nnsight_hpc.graph.build import READS, SETS, SKIP
from nnsight_hpc.graph.nodes import Held, map_leaves
from nnsight_hpc.tracing.lines import users_line
from nnsight_hpc.tracing.recorder import Recorder
from nnsight_hpc.wire.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import torch

    from nnsight_hpc.graph.nodes import Node
    from nnsight_hpc.tracing.batches import Batch

_POINTS = frozenset({*READS.values(), *SETS.values(), SKIP})


@dataclass(frozen=True)
class Edit:
    """A recording whose first node stands for the forward that it is applied to."""

    nodes: Sequence[Node]
    tensors: Mapping[str, torch.Tensor]
    objects: Sequence[Any]


class EditRecorder(Recorder):
    """Records an edit, which has nothing to return."""

    def save(self, value: Any) -> NoReturn:  # noqa: ARG002
        raise InvalidInput(
            "an edit keeps no values",
            where=str(users_line()),
            why="it is applied in traces that come later",
            next="save the value in a trace of the edited model",
        )

    def edit(self) -> Edit:
        return Edit(tuple(self.builder.nodes), dict(self.tensors), tuple(self.objects))


def replay(edits: Iterable[Edit], recorder: Recorder, batch: Batch) -> None:
    """Record `edits` for a forward; in a generation they hold at every step that names no step of its own."""
    for edit in edits:
        if edit.objects and recorder.remote:
            raise InvalidInput(
                "the edits of this model use Python functions or objects, which cannot be sent to a cluster",
                where=str(edit.nodes[0].source or ""),
                next="write them with torch operations on values, or run the trace with remote=False",
            )
        for step in (None,) if batch.steps is None else range(batch.steps):
            _apply(edit, recorder, batch.forward.node, step)


def _apply(edit: Edit, recorder: Recorder, forward: int, step: int | None) -> None:
    numbers = {0: forward}

    def leaf(value: Any) -> Any:
        if isinstance(value, Ref):
            return Ref(numbers[value.id])
        if isinstance(value, Held):
            return recorder.hold(edit.objects[value.number])
        return recorder.adopt(edit.tensors[value.name]) if isinstance(value, TensorRef) else value

    for node in edit.nodes[1:]:
        args, kwargs = map_leaves((node.args, dict(node.kwargs)), leaf)
        if node.op in _POINTS:  # a trace that does not come there is not changed there
            kwargs = {**({"call": step} if step else {}), **kwargs, "optional": True}
        block = recorder.block if node.block is None else numbers[node.block]
        numbers[node.id] = recorder.copy(replace(node, args=args, kwargs=kwargs, block=block))
