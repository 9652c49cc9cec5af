"""Bounds on Python's own memory: tensors and containers of which a few bytes of graph would make millions."""

from __future__ import annotations

from typing import Any

import torch

MAX_PARTS = 1 << 17
"""So many parts may a list, a tuple or a dict have in all; tensors are for more."""
_MAX_DEPTH = 32
_DIVIDING = frozenset({"unbind", "split", "chunk", "tensor_split", "hsplit", "vsplit", "dsplit"})


def check_parts(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise `ValueError` for an operation that would divide a tensor into far too many (``unbind`` of a long one)."""
    name = op.rpartition(".")[2]
    if name in _DIVIDING and args and isinstance(args[0], torch.Tensor):
        parts = _parts(name, *args, **kwargs)
        if parts > MAX_PARTS:
            raise ValueError(f"{name} would make {parts} tensors; the limit is {MAX_PARTS}")


def _parts(name: str, x: torch.Tensor, *args: Any, dim: Any = None, **kwargs: Any) -> int:
    """How many tensors a division gives at most; 0 where its arguments are wrong, which it will say itself."""
    number = 1 if name == "unbind" else next(iter((*args, *kwargs.values())), None)
    place = dim if dim is not None else next(iter(args[0 if name == "unbind" else 1 :]), 0)
    if not isinstance(number, int) or not isinstance(place, int) or not -x.ndim <= place < x.ndim or number < 1:
        return 0
    if name == "chunk":
        return min(number, int(x.shape[place]))
    return -(-x.shape[place] // number) if name in ("unbind", "split") else number


def check_container(value: Any) -> None:
    """Raise `ValueError` for a container of too many parts in all, too deep, or that holds itself."""
    left = MAX_PARTS
    waiting = [(value, 0)]
    while waiting:
        current, depth = waiting.pop()
        left -= 1
        inside = current.values() if isinstance(current, dict) else current
        if isinstance(current, dict | list | tuple):
            if depth >= _MAX_DEPTH or len(current) > left:
                raise ValueError(
                    f"a list or dict holds itself, more than {MAX_PARTS} parts, or {_MAX_DEPTH} levels: use tensors"
                )
            waiting += [(item, depth + 1) for item in inside]
