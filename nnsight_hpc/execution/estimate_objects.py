"""The memory of Python's own objects in a graph's values: lists, dicts, text, and tensors as objects, however small."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable

PER_ITEM = 40
"""Bytes of a number in a Python list, with the list's own entry."""
_PER_TENSOR = 512
"""Bytes of a tensor beside its elements."""
_PER_CHARACTER = 6
"""Bytes of a character in a result: JSON has ``\\u00e4`` for what is not ASCII."""
_SMALL = 4096


def objects_in(value: Any) -> dict[Hashable, int]:
    """The containers and texts in a nested value, each once, with their bytes; nothing where they are small."""
    if not isinstance(value, list | tuple | dict | str):
        return {}
    found: dict[Hashable, int] = {}
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if id(one) not in found:
            found[id(one)] = _size(one)
            waiting += _inside(one)
    return {("object", each): size for each, size in found.items()} if sum(found.values()) > _SMALL else {}


def bytes_as_result(value: Any) -> int:
    """Bytes of containers, numbers and text when they are returned: what is there several times is written several times."""
    known: dict[int, int] = {}

    def of(one: Any) -> int:
        if id(one) not in known:
            known[id(one)] = 0  # what holds itself is refused elsewhere
            known[id(one)] = (len(one) * _PER_CHARACTER if isinstance(one, str) else _size(one)) + sum(
                map(of, _inside(one))
            )
        return known[id(one)]

    total = of(value) if isinstance(value, list | tuple | dict | str) else 0
    return total if total > _SMALL else 0


def _size(one: Any) -> int:
    """Bytes of an object itself, with the numbers in it."""
    if isinstance(one, str):
        return sys.getsizeof(one)
    return PER_ITEM * (len(one) + 1) if isinstance(one, list | tuple | dict) else _PER_TENSOR


def _inside(one: Any) -> Iterable[Any]:
    """What is in a container and has a size of its own."""
    inner = one.values() if isinstance(one, dict) else one if isinstance(one, list | tuple) else ()
    return (item for item in inner if isinstance(item, list | tuple | dict | str | torch.Tensor))
