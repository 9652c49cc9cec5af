"""Some rows of a batch: what an invoke sees of the model's values, and how it puts its own in their place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Index = tuple[slice, ...]


class Part(NamedTuple):
    """A tensor is divided among the prompts along dimension `dim`, in their order.

    Each prompt has one entry there, or with `tokens` one for each of its tokens; None: whatever number is the same for all.
    """

    dim: int
    tokens: bool | None


class Common(NamedTuple):
    """A tensor does not depend on the prompts."""


class Mixed(NamedTuple):
    """A tensor that cannot be divided among the prompts."""

    why: str


class Mask(NamedTuple):
    """A mask of attention, which a model makes for each prompt or for all, as the data wants it: the first dimension tells."""


Rule = Part | Common | Mixed | Mask


def by_size(shape: Sequence[int], batch: int, tokens: int | None) -> Rule:
    """What the sizes of a tensor say of its rows, where nothing else is known; what they leave open is not guessed.

    Of a model with tokens, two dimensions with one entry a prompt may as well be some tokens of all prompts (an expert's).
    """
    flat = batch * tokens if tokens and tokens > 1 else batch
    dims = [dim for dim, size in enumerate(shape) if size in (batch, flat)]
    if dims == [0]:
        if shape[0] == batch and tokens and len(shape) <= 2 and flat != batch:
            return Mixed(f"its first dimension may be the batch of {batch}, or tokens of any prompts")
        return Part(0, tokens=shape[0] != batch)
    if dims:
        return Mixed(f"which of its dimensions is the batch of {batch} cannot be told")
    if len(shape) and shape[0] == 1 and all(size % batch for size in shape):
        return Common()
    many = f" nor its {flat} tokens" if flat != batch else ""
    return Mixed(f"its first dimension is neither the batch of {batch}{many}")


@dataclass(frozen=True)
class Rows:
    """The rows from `start` to before `stop` of a batch of `batch` rows with `tokens` tokens each (None: not known).

    `rules` says of the tensors that a nested value consists of where their rows are; by default their sizes do.
    """

    start: int
    stop: int
    batch: int
    tokens: int | None
    rules: Callable[[Sequence[Any]], Sequence[Rule | None]] | None = None

    def cut(
        self,
        value: Any,
        note: Callable[[torch.Tensor, torch.Tensor, Index], None] | None = None,
        common: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.clone,
    ) -> Any:
        """The part of a value that belongs to these rows; tensors in it are views.

        Raises `ValueError` for a tensor of which it cannot be said which part belongs to the rows.

        Parameters
        ----------
        note
            Told of each tensor that was cut: the part, the whole, and which part it is.
        common
            Gives the copy that is handed out of a tensor that is the same for all rows.
        """

        def part(whole: Any, rule: Rule | None) -> Any:
            if not isinstance(whole, torch.Tensor):
                return whole
            where = self._where(whole, rule)
            if where is None:
                return common(whole)
            cut = whole[where]
            if note:
                note(cut, whole, where)
            return cut

        if type(value) is torch.Tensor:
            return part(value, self._rules([value])[0])
        leaves, nesting = tree_flatten(value)
        return tree_unflatten([part(*pair) for pair in zip(leaves, self._rules(leaves), strict=True)], nesting)

    def put(self, value: Any, into: Any, *, own: bool = False) -> Any:
        """A copy of the whole value `into` with these rows replaced by `value`, which has the same nesting.

        With `own` it is such a copy already, and is written into.
        """
        parts, nesting = tree_flatten(value)
        wholes, whole_nesting = tree_flatten(into)
        if nesting != whole_nesting and len(parts) != len(wholes):
            raise ValueError(
                f"an invoke can only set what has the form of the model's own value, {type(into).__name__}"
            )
        new = [self._put(*each, own=own) for each in zip(parts, wholes, self._rules(wholes), strict=True)]
        return tree_unflatten(new, whole_nesting)

    def joined(self, others: Sequence[tuple[Rows, Any]]) -> Any:
        """The values of several invokes as one, where they are tensors that make up the whole batch in order; else None."""
        parts = [part for _, part in others]
        complete = sum(rows.stop - rows.start for rows, _ in others) == self.batch
        if not complete or not all(isinstance(part, torch.Tensor) and part.ndim for part in parts):
            return None
        whole = torch.empty((sum(map(len, parts)), *parts[0].shape[1:]), device="meta")
        rule = self._rules([whole])[0]
        return torch.cat(parts) if isinstance(rule, Part) and rule.dim == 0 else None

    def _rules(self, leaves: Sequence[Any]) -> Sequence[Rule | None]:
        return (None,) * len(leaves) if self.rules is None else self.rules(leaves)

    def _where(self, whole: torch.Tensor, rule: Rule | None) -> Index | None:
        """Which part of a tensor belongs to the rows; None when it is the same for all rows."""
        if rule is None:
            rule = by_size(whole.shape, self.batch, self.tokens)
        if isinstance(rule, Mask):
            rule = Common() if whole.shape[:1] == (1,) else Part(0, tokens=False)
        if isinstance(rule, Common):
            return None
        each = self._each(whole, rule) if isinstance(rule, Part) else 0
        if not isinstance(rule, Part) or not each:
            why = rule.why if isinstance(rule, Mixed) else f"its dimension {rule.dim} does not fit {self.batch} prompts"
            raise ValueError(f"a tensor of shape {list(whole.shape)} cannot be divided among the invokes: {why}")
        return (slice(None),) * rule.dim + (slice(self.start * each, self.stop * each),)

    def _each(self, whole: torch.Tensor, part: Part) -> int:
        """How many entries each prompt has in the dimension that is divided; 0 where the tensor is not as it should be."""
        size = whole.shape[part.dim] if part.dim < whole.ndim else 0
        each = size // self.batch if part.tokens is None else (self.tokens or 0) if part.tokens else 1
        return each if size == self.batch * each else 0

    def _put(self, part: Any, whole: Any, rule: Rule | None, *, own: bool) -> Any:
        if not isinstance(whole, torch.Tensor):
            return whole
        where = self._where(whole, rule)
        if where is None:
            if not isinstance(part, torch.Tensor) or not torch.equal(part, whole):
                raise only_for_all(whole)
            return whole
        new = whole if own else whole.clone()
        new[where] = part
        return new


def only_for_all(whole: torch.Tensor) -> ValueError:
    """The refusal of a change, by one invoke, of what is the same for all of them."""
    return ValueError(
        f"a tensor of shape {list(whole.shape)} is the same for all invokes, so one of them cannot change it: "
        "change it in `with tracer.invoke():`, which has all rows, or clone() it"
    )
