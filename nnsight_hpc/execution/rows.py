"""Some rows of a batch: what an invoke sees of the model's values, and how it puts its own in their place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Rows:
    """The rows from `start` to before `stop` of a batch of `batch` rows with `tokens` tokens each (None: not known)."""

    start: int
    stop: int
    batch: int
    tokens: int | None

    def cut(self, value: Any, note: Callable[[torch.Tensor, torch.Tensor, slice], None] | None = None) -> Any:
        """The part of a value that belongs to these rows; tensors in it are views.

        What does not depend on the prompt (a first dimension of 1) is copied, so that no change to it reaches other rows.
        Raises `ValueError` for a tensor of which it cannot be said which part belongs to the rows.

        Parameters
        ----------
        note
            Told of each tensor that was cut: the part, the whole, and which part it is.
        """

        def part(whole: torch.Tensor) -> torch.Tensor:
            where = self.where(whole)
            if where is None:
                return whole.clone()
            cut = whole[where]
            if note:
                note(cut, whole, where)
            return cut

        return tree_map_only(torch.Tensor, part, value)

    def where(self, whole: torch.Tensor) -> slice | None:
        """Which part of its first dimension belongs to the rows; None when it is the same for all rows."""
        first = whole.shape[0] if whole.ndim else None
        if first == self.batch:
            return slice(self.start, self.stop)
        if self.tokens and first == self.batch * self.tokens:
            return slice(self.start * self.tokens, self.stop * self.tokens)
        if first == 1:
            return None
        raise ValueError(
            f"a tensor of shape {list(whole.shape)} cannot be divided among the invokes: its first dimension is neither the "
            f"batch of {self.batch}" + (f" nor its {self.batch * self.tokens} tokens" if self.tokens else "")
        )

    def put(self, value: Any, into: Any) -> Any:
        """A copy of the whole value `into` with these rows replaced by `value`, which has the same nesting."""
        parts, nesting = tree_flatten(value)
        wholes, whole_nesting = tree_flatten(into)
        if nesting != whole_nesting and len(parts) != len(wholes):
            raise ValueError(
                f"an invoke can only set what has the form of the model's own value, {type(into).__name__}"
            )
        return tree_unflatten([self._put(p, w) for p, w in zip(parts, wholes, strict=True)], whole_nesting)

    def _put(self, part: Any, whole: Any) -> Any:
        if not isinstance(whole, torch.Tensor):
            return whole
        where = self.where(whole)
        if where is None:
            if not isinstance(part, torch.Tensor) or not torch.equal(part, whole):
                raise ValueError(
                    f"a tensor of shape {list(whole.shape)} is the same for all invokes; one cannot set it"
                )
            return whole
        new = whole.clone()
        new[where] = part
        return new
