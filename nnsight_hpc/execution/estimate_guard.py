"""Sizes that depend on data: found out from the real arguments, just before an operation takes the memory."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from nnsight_hpc.execution.bounds import check_indices
from nnsight_hpc.execution.estimate_budget import in_words, memory_budget
from nnsight_hpc.execution.estimate_objects import PER_ITEM
from nnsight_hpc.execution.fake_limits import check_parts
from nnsight_hpc.execution.resolve import carry_out
from nnsight_hpc.wire.errors import InvalidGraph

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from nnsight_hpc.execution.estimate_watch import Watch
    from nnsight_hpc.execution.fake_model import Twin
    from nnsight_hpc.graph.nodes import Node

_SMALL = 16 << 20
"""What takes no more is not held against the memory that is free."""
_INDEX = 8
_FIRST = ("input", "tensor")
"""What torch calls the first argument of the operations below, where it is given by name."""


@dataclass(frozen=True)
class Guard:
    """What the check of a graph has left to the run.

    Attributes
    ----------
    estimate
        Bytes that the graph takes at its peak, without what could not be known.
    unchecked
        The nodes whose size depends on data, and on a GPU those with indices.
    budget
        Bytes that it may take.
    watch
        Looks before each node at what the run has taken; None: nobody does.
    """

    twin: Twin
    estimate: int
    unchecked: frozenset[int]
    budget: int
    watch: Watch | None = None

    def check(self, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise `InvalidGraph` when `node` would take more memory on these real arguments than there is.

        For nodes in `unchecked`, before they are carried out. It takes about 0.1 ms. On a GPU indices are looked at, too.
        """
        check_parts(node.op, args, kwargs)
        if self.twin.device.type == "cuda":
            check_indices(node.op, args, kwargs)
        needed = allocation(self.twin, node.op, args, kwargs)
        if needed <= _SMALL:
            return
        budget = min(self.budget, memory_budget(self.twin.device))
        if needed > budget:
            raise too_large(node, needed, budget, "its size depends on data, and was found out when the data was there")

    def within(self, own: Mapping[int, int]) -> Guard:
        """The same for a part of the graph with numbers of its own: `own` has them by the graph's."""
        return replace(self, unchecked=frozenset(own[node] for node in self.unchecked if node in own))


def too_large(node: Node, needed: int, budget: int, why: str) -> InvalidGraph:
    """The refusal of a graph because of memory."""
    return InvalidGraph(
        f"node {node.id} ({node.op}) would bring the graph to about {in_words(needed)} of memory; "
        f"the budget is {in_words(budget)}",
        where=str(node.source or ""),
        why=why,
        next="reduce on the way (a slice, a mean), save less at once, or divide the inputs among several requests",
    )


def allocation(twin: Twin, op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Bytes that an operation makes of real arguments, at least in its largest step."""
    with suppress(
        TypeError, ValueError, RuntimeError, IndexError, AttributeError
    ):  # wrong arguments are not our concern
        bound = _bound(op, args, kwargs)
        if bound is not None:
            return bound
    fake_args, fake_kwargs = tree_map_only(torch.Tensor, lambda t: twin.fake_known(t, t.device), (args, kwargs))
    twin.mode.largest = 0
    try:
        with twin.active():
            carry_out(op, fake_args, fake_kwargs, twin.device)
    except Exception:  # noqa: BLE001 - not known, or a fault of the fake form: then what most operations stay within
        return sum(_bytes(t) + _nonzero(t) for t in _tensors((args, kwargs)))
    return int(twin.mode.largest)


def _bound(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Bytes for an operation whose result depends on data; None for any other."""
    named = {key: value for key, value in kwargs.items() if key not in _FIRST}
    first = (kwargs[key] for key in _FIRST if key in kwargs)
    return _BOUNDS[op](*first, *args, **named) if op in _BOUNDS else None


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _bytes(tensor: torch.Tensor) -> int:
    return int(tensor.numel() * tensor.element_size())


def _nonzero(x: torch.Tensor, **_: Any) -> int:
    return int(x.numel() * x.ndim * _INDEX)


def _masked_select(x: torch.Tensor, mask: torch.Tensor) -> int:
    return int(torch.broadcast_shapes(x.shape, mask.shape).numel() * x.element_size())


def _getitem(x: Any, index: Any) -> int | None:
    """A mask selects all at most, and its positions are listed on the way. Without a mask fakes know the size."""
    masks = [t for t in _tensors(index) if t.dtype in (torch.bool, torch.uint8)]
    if not masks or not isinstance(x, torch.Tensor):
        return None
    others = [t.shape for t in _tensors(index) if t.dtype not in (torch.bool, torch.uint8)]
    return _bytes(x) * int(torch.broadcast_shapes(*others, (1,)).numel()) + sum(map(_nonzero, masks))


def _unique(x: torch.Tensor, *_: Any, **__: Any) -> int:
    return int(x.numel() * (x.element_size() + 2 * _INDEX))


def _repeat_interleave(x: Any = None, repeats: Any = None, dim: int | None = None, **_: Any) -> int:
    if x is None or repeats is None:  # positions, each as often as it says
        return int((repeats if x is None else x).sum()) * _INDEX
    if isinstance(repeats, torch.Tensor) and repeats.numel() > 1:
        return _bytes(x) * int(repeats.sum()) // max(int(x.numel() if dim is None else x.shape[dim]), 1)
    return _bytes(x) * int(repeats)


def _bincount(x: torch.Tensor, weights: Any = None, minlength: int = 0) -> int:  # noqa: ARG001 - as in torch
    return max(minlength, int(x.max()) + 1 if x.numel() else 0) * _INDEX


def _histogram(x: torch.Tensor, bins: Any, **_: Any) -> int:
    return _histogramdd(x.flatten()[:0, None], bins)


def _histogramdd(x: torch.Tensor, bins: Any, **_: Any) -> int:
    """A cell for each combination of bins, one for each column, and the edges of each."""
    each = bins if isinstance(bins, list | tuple) else [bins] * x.shape[-1]
    numbers = [b.numel() if isinstance(b, torch.Tensor) and b.ndim else int(b) for b in each]
    return int((math.prod(numbers) + sum(numbers)) * x.element_size())


def _one_hot(tensor: torch.Tensor, num_classes: int = -1) -> int:
    return int(tensor.numel()) * _INDEX * (num_classes if num_classes >= 0 else int(tensor.max()) + 1)


def _tolist(x: torch.Tensor) -> int:
    return int(x.numel() * PER_ITEM)


_BY_NAME: dict[str, Callable[..., int]] = {
    "nonzero": _nonzero,
    "argwhere": _nonzero,
    "masked_select": _masked_select,
    "unique": _unique,
    "unique_consecutive": _unique,
    "repeat_interleave": _repeat_interleave,
    "bincount": _bincount,
    "tolist": _tolist,
    "histogram": _histogram,
    "histogramdd": _histogramdd,
}
_BOUNDS: dict[str, Callable[..., int | None]] = {
    "operator.getitem": _getitem,
    "torch.nn.functional.one_hot": _one_hot,
    **{f"{prefix}.{name}": bound for prefix in ("torch", "Tensor") for name, bound in _BY_NAME.items()},
}
