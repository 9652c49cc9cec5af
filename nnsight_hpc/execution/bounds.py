"""Indices and probabilities that a GPU must not see: its kernels do not raise, they end every program of the process.

On a GPU torch checks these by assertions on the device. After one, each later call fails, and a resident model is lost for
all who use it ("Error Checking" in NVIDIA's CUDA C++ Programming Guide). So what comes from a request is looked at before, and
what torch refuses on the CPU is refused. To look at a tensor waits for the GPU; to look at a list does not.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from nnsight_hpc.graph.nodes import Ref, TensorRef, leaves

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from nnsight_hpc.graph.nodes import Node


class Index(NamedTuple):
    """Where an operation reads or writes: from `lowest` to before `size`."""

    values: torch.Tensor | list[Any]
    dim: int
    size: int
    lowest: int


def may_be_wrong(node: Node) -> bool:
    """Whether a node has indices or probabilities that only a run can know, or that a kernel alone would look at."""
    if node.op in ("operator.getitem", "operator.setitem"):
        index = node.args[1] if len(node.args) > 1 else None
        return any(isinstance(leaf, Ref | TensorRef) for leaf in leaves(index)) or _has_list(index)
    return node.op in _INDICES or node.op in _CHECKS


def check_indices(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse an operation of which an index or a probability is out of bounds: `IndexError`, `RuntimeError`.

    Arguments that do not fit the operation are left to it: it raises, and says why.
    """
    if op in _CHECKS:
        _CHECKS[op](*args, **kwargs)
        return
    for index in _indices_of(op, args, kwargs):
        lowest, highest = _extremes(index.values)
        wrong = lowest if lowest < index.lowest else highest
        if lowest < index.lowest or highest >= index.size:
            raise IndexError(f"index {wrong} is out of bounds for dimension {index.dim} with size {index.size}")


def check_ids(embedding: torch.nn.Embedding, args: tuple[Any, ...]) -> None:
    """A hook before an embedding: raise `IndexError` for ids that it has no row for, as on the CPU."""
    lowest, highest = _extremes(args[0]) if args else (0, -1)
    if lowest < 0 or highest >= embedding.num_embeddings:
        raise IndexError(
            f"index {lowest if lowest < 0 else highest} is out of range: the embedding has {embedding.num_embeddings} rows "
            "(a token that the model does not know, or a prompt that is longer than it can read)"
        )


def _indices_of(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Index]:
    try:
        return [index for index in _INDICES[op](*args, **kwargs) if _numbers(index.values)]
    except (TypeError, AttributeError, IndexError, KeyError):
        return []


def _numbers(values: Any) -> bool:
    """Whether there is any index, and they are whole numbers, not a mask."""
    if isinstance(values, torch.Tensor):
        return bool(values.numel()) and not values.is_floating_point() and values.dtype not in _MASKS
    return bool(values) and all(isinstance(each, int) and not isinstance(each, bool) for each in leaves(values))


def _extremes(values: torch.Tensor | list[Any]) -> tuple[int, int]:
    if not isinstance(values, torch.Tensor):
        numbers = [*leaves(values)]
        return min(numbers), max(numbers)
    if not values.numel():
        return 0, -1
    lowest, highest = torch.stack(torch.aminmax(values)).tolist()
    return lowest, highest


def _has_list(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, tuple) and any(map(_has_list, value)))


def _subscript(x: torch.Tensor, index: Any, *_: Any) -> Iterator[Index]:
    parts = index if isinstance(index, tuple) else (index,)
    taken = sum(_dimensions(part) for part in parts)
    dim = 0
    for part in parts:
        if part is Ellipsis:
            dim += x.ndim - taken
            continue
        if isinstance(part, torch.Tensor | list):
            yield Index(part, dim, x.shape[dim], -x.shape[dim])
        dim += _dimensions(part)


def _dimensions(part: Any) -> int:
    """How many dimensions of a tensor a part of its subscript stands for."""
    if part is None or part is Ellipsis or isinstance(part, bool):
        return 0
    return part.ndim if isinstance(part, torch.Tensor) and part.dtype in _MASKS else 1


def _along(input: torch.Tensor, dim: int, index: Any, *_: Any, **__: Any) -> Iterator[Index]:
    size = input.shape[dim] if input.ndim else 1
    yield Index(index, dim, size, 0)


def _filled(input: torch.Tensor, dim: int, index: Any, *_: Any, **__: Any) -> Iterator[Index]:
    size = input.shape[dim] if input.ndim else 1
    yield Index(index, dim, size, -size)


def _taken(input: torch.Tensor, index: Any, *_: Any, **__: Any) -> Iterator[Index]:
    yield Index(index, 0, input.numel(), -input.numel())


def _taken_along(input: torch.Tensor, indices: Any, dim: int | None = None) -> Iterator[Index]:
    if dim is None:  # along a dimension torch itself brings every index into bounds
        yield Index(indices, 0, input.numel(), 0)


def _put(input: torch.Tensor, indices: Any, *_: Any, **__: Any) -> Iterator[Index]:
    yield from _subscript(input, tuple(indices))


def _rows(input: torch.Tensor, weight: torch.Tensor, *_: Any, **__: Any) -> Iterator[Index]:
    yield Index(input, 0, weight.shape[0], 0)


def _classes(
    input: torch.Tensor, target: torch.Tensor, *_: Any, ignore_index: int = -100, **__: Any
) -> Iterator[Index]:
    size = input.shape[1] if input.ndim > 1 else input.shape[0]
    if not target.is_floating_point():
        yield Index(target[target != ignore_index], 1, size, 0)


def _labels(input: torch.Tensor, target: torch.Tensor, *_: Any, **__: Any) -> Iterator[Index]:
    yield Index(target, input.ndim - 1, input.shape[-1], -1)


def _one_hot(tensor: torch.Tensor, num_classes: int = -1) -> Iterator[Index]:
    yield Index(tensor, 0, num_classes if num_classes > 0 else 1 << 62, 0)


def _probabilities(input: torch.Tensor, *_: Any, **__: Any) -> None:
    if not bool(((input >= 0) & input.isfinite()).all()):
        raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")


def _shares(input: Any, p: Any = None, *_: Any, **__: Any) -> None:
    for value in (input, p):
        if (
            isinstance(value, torch.Tensor)
            and value.is_floating_point()
            and not bool(((value >= 0) & (value <= 1)).all())
        ):
            raise RuntimeError("all elements of the input should be between 0 and 1")


def _repeats(input: Any, repeats: Any = None, *_: Any, **__: Any) -> None:
    counts = input if repeats is None else repeats
    if isinstance(counts, torch.Tensor) and counts.numel() and bool((counts < 0).any()):
        raise RuntimeError("repeats can not be negative")


def _masked(input: torch.Tensor, mask: torch.Tensor, source: torch.Tensor) -> None:
    copies = math.prod(torch.broadcast_shapes(input.shape, mask.shape)) // max(1, mask.numel())
    if int(mask.sum()) * copies > source.numel():
        raise RuntimeError("masked_scatter: the source has fewer elements than the mask selects")


_MASKS = (torch.bool, torch.uint8)


def _methods(names: str, check: Callable[..., Any], prefixes: tuple[str, ...] = ("torch", "Tensor")) -> dict[str, Any]:
    return {f"{prefix}.{name}": check for name in names.split() for prefix in prefixes}


_INDICES: dict[str, Callable[..., Iterator[Index]]] = {
    "operator.getitem": _subscript,
    "operator.setitem": _subscript,
    **_methods("gather index_select index_add index_copy index_reduce scatter scatter_add scatter_reduce", _along),
    **_methods("index_add_ index_copy_ index_reduce_ scatter_ scatter_add_ scatter_reduce_", _along, ("Tensor",)),
    **_methods("index_fill", _filled),
    **_methods("index_fill_", _filled, ("Tensor",)),
    **_methods("take put", _taken),
    **_methods("put_", _taken, ("Tensor",)),
    **_methods("take_along_dim", _taken_along),
    **_methods("index_put", _put),
    **_methods("index_put_", _put, ("Tensor",)),
    **_methods("embedding", _rows, ("torch.nn.functional",)),
    **_methods("nll_loss cross_entropy multi_margin_loss", _classes, ("torch.nn.functional",)),
    **_methods("multilabel_margin_loss", _labels, ("torch.nn.functional",)),
    **_methods("one_hot", _one_hot, ("torch.nn.functional",)),
}
_CHECKS: dict[str, Callable[..., None]] = {
    **_methods("multinomial", _probabilities),
    **_methods("bernoulli", _shares),
    **_methods("bernoulli_", _shares, ("Tensor",)),
    **_methods("binary_cross_entropy", _shares, ("torch.nn.functional",)),
    **_methods("repeat_interleave", _repeats),
    **_methods("masked_scatter", _masked),
    **_methods("masked_scatter_", _masked, ("Tensor",)),
}
