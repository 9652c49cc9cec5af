"""What conditionals, loops and logs of a graph need of plain Python."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

MOST_PASSES = 1_000_000
_MOST_CHARACTERS = 10_000


def as_items(value: Any) -> Iterable[Any]:
    """What a loop over `value` runs over: rows of a tensor, entries of a list, tuple, range, or keys of a dict."""
    if isinstance(value, torch.Tensor) and not value.ndim:
        raise TypeError("iteration over a 0-d tensor")
    if not isinstance(value, torch.Tensor | list | tuple | range | dict):
        raise TypeError(f"a value of type {type(value).__name__} cannot be iterated over")
    if len(value) > MOST_PASSES:
        raise ValueError(f"a loop of {len(value)} passes; the limit is {MOST_PASSES}")
    return value.unbind(0) if isinstance(value, torch.Tensor) else list(value)


def range_of(*bounds: Any) -> range:
    """``range`` with bounds that may be tensors of one integer."""
    made = range(*[bound.item() if isinstance(bound, torch.Tensor) else bound for bound in bounds])
    if len(made) > MOST_PASSES:
        raise ValueError(f"a range of {len(made)} numbers; the limit is {MOST_PASSES}")
    return made


def text_of(part: Any) -> str:
    """A part of a logged line."""
    text = str(part)
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}…"
