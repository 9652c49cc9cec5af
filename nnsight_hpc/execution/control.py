"""What conditionals, loops and logs of a graph need of plain Python."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

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
    """A part of a logged line; of what is long, the beginning, and no more is ever made."""
    text, pieces = "", (part[: _MOST_CHARACTERS + 1],) if isinstance(part, str) else _written(part)
    for piece in pieces:
        text += piece
        if len(text) > _MOST_CHARACTERS:
            return f"{text[:_MOST_CHARACTERS]}…"
    return text


def _written(value: Any) -> Iterator[str]:
    """What `str` makes of a value that is no text itself, piece by piece."""
    if type(value) is str:
        yield repr(value[:_MOST_CHARACTERS])
    elif type(value) is list or type(value) is tuple:
        yield "[" if type(value) is list else "("
        for number, item in enumerate(value):
            yield ", " if number else ""
            yield from _written(item)
        yield "]" if type(value) is list else ",)" if len(value) == 1 else ")"
    elif type(value) is dict:
        yield "{"
        for number, (key, item) in enumerate(value.items()):
            yield f"{', ' if number else ''}{key!r}: "
            yield from _written(item)
        yield "}"
    else:
        yield repr(value)
