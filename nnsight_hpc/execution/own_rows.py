"""What one of several graphs sees of the forward that they share: its own rows, and nothing that may hold another's."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves

from nnsight_hpc.execution.rows import Mixed, Rows, Rule

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nnsight_hpc.execution.batch import Batch
    from nnsight_hpc.execution.moments import Moment
    from nnsight_hpc.graph.points import Point

_UNCERTAIN = Mixed("it is not known where the rows of a prompt are in it")
_SAME_FOR_ALL = (bool, int, float, str, type(None))
"""Types of what a module is given or gives, beside tensors, that tell nothing of a prompt."""


class Whole:
    """The rows of all graphs together."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self._put: tuple[tuple[str, str, int], Any] | None = None

    def put(self, rows: Rows, value: Any, into: Any, point: Point) -> Any:
        """What stands at a point, with some rows replaced: a copy, which the next who sets rows there writes into."""
        place = point.module, point.kind, point.call
        own = self._put is not None and self._put[0] == place and self._put[1] is into
        made = rows.put(value, into, own=own)
        self._put = place, made
        return made


class OwnRows:
    """The rows from `start` to before `stop` of a whole.

    Parameters
    ----------
    common
        Gives the copy that is handed out of a tensor that is the same for all rows.
    """

    def __init__(self, whole: Whole, start: int, stop: int, common: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._whole, self._part, self._common = whole, (start, stop), common

    def cut(self, value: Any, point: Point) -> Any:
        """These rows of what stands at a point; raises `ValueError` where it is not certain which they are."""
        rows = self._at(point)
        return value if rows is None else rows.cut(value, None, self._common)

    def put(self, value: Any, into: Any, point: Point) -> Any:
        """What stands at a point, with these rows replaced; raises `ValueError` for a value of another form."""
        rows = self._at(point)
        if rows is None:
            return value
        if _forms(value) != _forms(rows.cut(into)):
            raise ValueError("a value of another shape or dtype cannot stand beside the others'")
        return self._whole.put(rows, value, into, point)

    def _at(self, point: Point) -> Rows | None:
        rows = self._whole.batch.part(*self._part, point)
        return rows and replace(rows, rules=_certain(rows.rules))


class OwnMoment:
    """What stands at the place that the model is at, of which nodes see some rows."""

    __slots__ = ("_moment", "_point", "_rows")

    def __init__(self, moment: Moment, rows: OwnRows, point: Point) -> None:
        self._moment, self._rows, self._point = moment, rows, point

    def get(self, kind: str) -> Any:
        return self._rows.cut(self._moment.get(kind), self._point)

    def set(self, kind: str, value: Any) -> None:
        self._moment.set(kind, self._rows.put(value, self._moment.get(kind), self._point))


def _certain(rules: Callable[[Sequence[Any]], Sequence[Rule | None]] | None) -> Callable[..., list[Rule | None]]:
    """`rules`, where sizes alone are no reason to say that rows are somebody's, and nothing is shown that may hold others'."""
    assert rules is not None, "a batch says by rules where its rows are"

    def certain(leaves: Sequence[Any]) -> list[Rule | None]:
        for leaf in leaves:
            if not isinstance(leaf, (torch.Tensor, *_SAME_FOR_ALL)):
                raise ValueError(f"a {type(leaf).__name__} cannot be divided among graphs")  # noqa: TRY004 - no error of a caller
        return [_UNCERTAIN if rule is None else rule for rule in rules(leaves)]

    return certain


def _forms(value: Any) -> list[Any]:
    return [(leaf.shape, leaf.dtype) if isinstance(leaf, torch.Tensor) else type(leaf) for leaf in tree_leaves(value)]
