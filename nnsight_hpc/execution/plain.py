"""Python's operators on what is no tensor, bounded: integers of 64 bits, short text, lists of a million entries.

Without bounds a graph of three nodes (``9**9**9``, ``"%999999999d" % 1``, ``[0] * 10**12``) would keep a worker busy for ever.
Lists and dicts that operators make, or that are written into, get copies of tensors: who shares memory is read off the graph,
and a graph does not say whether ``a + b`` adds numbers or lists.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch

from nnsight_hpc.graph.limits import MAX_INTEGER, MAX_STRING
from nnsight_hpc.graph.nodes import map_leaves

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_ENTRIES = 1_000_000
MAX_CHARACTERS = 1 << 24
"""In all texts of one nested value."""
_BITS = MAX_INTEGER.bit_length()
_COMPARISONS = frozenset({"eq", "ne", "lt", "le", "gt", "ge", "contains"})
_AUGMENTED = {
    "iadd": "add",
    "isub": "sub",
    "imul": "mul",
    "ipow": "pow",
    "imod": "mod",
    "ilshift": "lshift",
    "ior": "or_",
}
BOUNDED = _COMPARISONS | _AUGMENTED.keys() | set(_AUGMENTED.values())
"""The functions of ``operator`` whose result, or time, may be out of proportion to what goes in."""
_COLLECTIONS = (str, list, tuple, dict, range)
_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})
_WITH_TENSORS = _TENSORS | {int, float, bool}
_ENDS = _TENSORS | {int, slice, str, type(None), type(...)}
"""Types of an index that has an end."""


def bounded(name: str) -> Callable[[Any, Any], Any]:
    """The binary function `name` of ``operator``; raises `OverflowError` or `ValueError` where its result would be large."""
    function: Callable[[Any, Any], Any] = getattr(operator, name)
    check = _OF_NUMBERS.get(_AUGMENTED.get(name, name))

    def call(a: Any, b: Any) -> Any:
        if type(a) in _TENSORS and type(b) in _WITH_TENSORS:  # nearly always, and at once
            return function(a, b)
        if isinstance(a, _COLLECTIONS) or isinstance(b, _COLLECTIONS):
            return _on_collections(name, function, a, b)
        if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
            return function(a, b)
        if check is not None and isinstance(a, int) and isinstance(b, int):
            check(a, b)
        result = function(a, b)
        if isinstance(result, int) and abs(result) > MAX_INTEGER:
            raise OverflowError(f"an integer of more than {_BITS} bits")
        return result

    call.__qualname__ = name  # as errors of wrong arguments say it
    return call


def set_item(value: Any, index: Any, new: Any) -> Any:
    """``value[index] = new`` on a tensor, a list or a dict; the value is `value`."""
    if isinstance(value, torch.Tensor):
        value[index] = new
        return value
    if not isinstance(value, list | dict):
        raise TypeError(f"only elements of tensors, lists and dicts can be set, not of a {type(value).__name__}")
    if isinstance(value, list) and isinstance(index, slice):
        raise TypeError("entries of a list are set one by one, not by slices")
    if isinstance(value, dict) and not isinstance(index, str):
        raise TypeError("the keys of a dict are strings")
    value[index] = _copied(new)
    return within(value) if isinstance(new, list | tuple | dict) else value


def get_item(value: Any, index: Any) -> Any:
    """``value[index]``, with an index that has an end."""
    if type(index) not in _ENDS:
        for part in index if type(index) is tuple else (index,):
            if isinstance(part, list | tuple | dict | range):
                within(part)
    return value[index]


def within(value: Any) -> Any:
    """`value`, which has at most a million entries, those of lists in lists counted, too, each time that they are there.

    Raises `ValueError`, also where its texts have more than `MAX_CHARACTERS` together. A list that holds one list twice, which
    holds one twice, …, is small, and a walk has no end.
    """
    waiting, seen, characters = [value], 0, 0
    while waiting:
        entries = waiting.pop()
        seen += len(entries) if isinstance(entries, _COLLECTIONS) and not isinstance(entries, str) else 1
        if seen > MAX_ENTRIES:
            raise ValueError(
                f"more than {MAX_ENTRIES} entries, those of lists in lists counted, too; that is the limit"
            )
        if isinstance(entries, list | tuple | dict):
            inner = entries.values() if isinstance(entries, dict) else entries
            characters += sum(len(entry) for entry in inner if type(entry) is str)
            if characters > MAX_CHARACTERS:
                raise ValueError(f"text of more than {MAX_CHARACTERS} characters in one value; that is the limit")
            waiting += [entry for entry in inner if isinstance(entry, list | tuple | dict | range)]
    return value


def _on_collections(name: str, function: Callable[[Any, Any], Any], a: Any, b: Any) -> Any:
    if name in _COMPARISONS:
        return function(within(a), within(b))
    plain = _AUGMENTED.get(name, name)
    if plain == "add" and any(isinstance(a, kind) and isinstance(b, kind) for kind in (str, list, tuple)):
        _at_most(len(a) + len(b), a)
    elif plain == "mul" and isinstance(a, str | list | tuple) and isinstance(b, int):
        _at_most(len(a) * b, a)
    elif plain == "mul" and isinstance(b, str | list | tuple) and isinstance(a, int):
        _at_most(len(b) * a, b)
    elif not (plain == "or_" and isinstance(a, dict) and isinstance(b, dict)):
        raise TypeError(f"operator.{name} does not work on {type(a).__name__} and {type(b).__name__}")
    return function(a, _copied(b)) if name in _AUGMENTED else _copied(function(a, b))


def _copied(value: Any) -> Any:
    """The same collection with copies of the tensors in it."""
    if isinstance(value, torch.Size | str):
        return value
    return map_leaves(within(value), lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf)


def _power(a: int, b: int) -> None:
    if abs(a) > 1 and b > _BITS:
        raise OverflowError(f"{a} ** {b} is an integer of more than {_BITS} bits")


def _shift(a: int, b: int) -> None:
    if b > _BITS:
        raise OverflowError(f"{a} << {b} is an integer of more than {_BITS} bits")


_OF_NUMBERS: dict[str, Callable[[int, int], None]] = {"pow": _power, "lshift": _shift}


def _at_most(length: int, like: str | list[Any] | tuple[Any, ...]) -> None:
    limit, what = (MAX_STRING, "characters") if isinstance(like, str) else (MAX_ENTRIES, "entries")
    if length > limit:
        raise ValueError(f"a {type(like).__name__} of {length} {what}; the limit is {limit}")
