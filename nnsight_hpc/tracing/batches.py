"""The rows of one forward: invokes whose inputs have the same form are given to the model together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from nnsight_hpc.tracing.value import Value

_PLAIN = (type(None), bool, int, float, complex, str)


class Batch:
    """A forward node, and the inputs and rows that its invokes have given so far; further ones must have its `form`, if any."""

    def __init__(self, forward: Value, form: Any) -> None:
        self.forward, self.form, self.rows = forward, form, 0
        self.parts: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """All that was given, as arguments of one call."""
        joined: tuple[tuple[Any, ...], dict[str, Any]] = self.parts[0] if len(self.parts) == 1 else _joined(self.parts)
        return joined

    @property
    def steps(self) -> int | None:
        """At most so many tokens are generated."""
        steps: int | None = self.parts[0][1].get("max_new_tokens")
        return steps


def form_of(inputs: Any) -> tuple[Any, int | None]:
    """What inputs must have in common to be given to the model together (None: nothing will do), and how many rows they are.

    That is their nesting, everything in them that is no tensor, and of tensors all but the first dimension.
    """
    rows: set[int] = set()
    try:
        form = _form(inputs, rows)
    except TypeError:
        return None, None
    return (form, rows.pop()) if len(rows) == 1 else (None, None)


def _form(value: Any, rows: set[int]) -> Any:
    """The form of a nested value; the first dimensions of its tensors are added to `rows`."""
    if isinstance(value, torch.Tensor) and value.ndim:
        rows.add(len(value))
        return "tensor", value.shape[1:], value.dtype, value.device
    if type(value) in (list, tuple):
        return type(value), tuple(_form(item, rows) for item in value)
    if isinstance(value, dict):
        return dict, tuple((key, _form(item, rows)) for key, item in value.items())
    if type(value) in _PLAIN:
        return type(value), value
    raise TypeError("whether two of these are equal is not known")


def _joined(parts: list[Any]) -> Any:
    """Values of one form as one of that form, their tensors joined along the first dimension."""
    first = parts[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(parts)
    if isinstance(first, list | tuple):
        return type(first)(_joined(list(items)) for items in zip(*parts, strict=True))
    if isinstance(first, dict):
        return {key: _joined([part[key] for part in parts]) for key in first}
    return first
