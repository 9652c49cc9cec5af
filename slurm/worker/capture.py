"""Run a graph on batches of documents, and take what it keeps as NumPy arrays that storage can write."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch

from nnsight_hpc.storage import CaptureSpec
from nnsight_hpc.storage.schema import LOGICAL_DTYPES, physical_dtype
from nnsight_hpc.wire.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import numpy.typing as npt

    from nnsight_hpc.graph import Graph

    Run = Callable[[Graph, Mapping[str, torch.Tensor]], Mapping[str, Any]]
    """Runs a graph with its tensors, and returns what it saves."""

Index = tuple[int | slice, ...]
"""Some rows in a value of a forward: a document, and of it some tokens; or some documents."""

_FLOATS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
_PROBES = ((2, 3), (5, 7))
"""Documents and tokens of two forwards that find out the shapes: numbers that tell the dimensions apart."""

_LEADING: dict[Literal["token", "document"], int] = {"token": 2, "document": 1}
"""Of how many leading dimensions rows are made."""


class Program(NamedTuple):
    """What is run on each batch.

    Attributes
    ----------
    tensors
        The graph's constants, without those that stand for the batch.
    padding
        The token that stands where no document is.
    """

    graph: Graph
    tensors: Mapping[str, torch.Tensor]
    padding: int
    run: Run

    def on(self, documents: Sequence[npt.NDArray[np.int32]]) -> Mapping[str, Any]:
        """What the graph keeps of documents that share a forward."""
        return self.run(self.graph, self.tensors_for(documents))

    def tensors_for(self, documents: Sequence[npt.NDArray[np.int32]]) -> Mapping[str, torch.Tensor]:
        """All that the graph is given in a forward of these documents."""
        return {**self.tensors, **batch_of(documents, self.padding)}


def probe(program: Program, dtype: str) -> tuple[CaptureSpec, ...]:
    """What the values that `program` keeps look like: what their rows are, the other dimensions, how they are stored.

    Two small batches are run. What has a row for each token of both is kept so, and else what has one for each document.

    Raises
    ------
    InvalidInput
        `dtype` is none, or a value is not one tensor with such rows; it names the user's line.
    """
    if dtype != "auto" and dtype not in _FLOATS:
        raise InvalidInput(f"activations cannot be stored as {dtype!r}", next=f"use auto, {', '.join(_FLOATS)}")
    seen = [program.on([np.zeros(tokens, dtype=np.int32)] * documents) for documents, tokens in _PROBES]
    nodes, saves = program.graph.nodes, program.graph.saves
    lines = {name: str(nodes[save].source or "") for name, save in saves.items()}
    return tuple(_spec(name, [values[name] for values in seen], dtype, lines[name]) for name in seen[0])


def _spec(name: str, values: Sequence[Any], dtype: str, where: str) -> CaptureSpec:
    tensors = [_tensor(name, value, where) for value in values]
    first, shapes = tensors[0], [tuple(tensor.shape) for tensor in tensors]
    rows = next((kind for kind, leading in _LEADING.items() if _has_rows(shapes, leading)), None)
    if rows is None:
        found = [f"{list(s)} for {d} documents of {n} tokens" for s, (d, n) in zip(shapes, _PROBES, strict=True)]
        raise InvalidInput(
            f"{name} has no row for each token or for each document",
            where=where,
            why=f"its shape is {' and '.join(found)}",
            next="keep a value of the shape [documents, tokens, …] or [documents, …]",
        )
    stored = dtype if dtype != "auto" and first.is_floating_point() else str(first.dtype).removeprefix("torch.")
    if stored not in LOGICAL_DTYPES:
        raise InvalidInput(
            f"{name} cannot be stored as {stored}",
            where=where,
            next=f"convert it to one of {', '.join(LOGICAL_DTYPES)}",
        )
    return CaptureSpec(name, shapes[0][_LEADING[rows] :], stored, rows)


def _has_rows(shapes: Sequence[tuple[int, ...]], leading: int) -> bool:
    """Whether shapes begin with that many numbers of the probes, and are the same otherwise."""
    begins = all(shape[:leading] == probe[:leading] for shape, probe in zip(shapes, _PROBES, strict=True))
    return begins and len({shape[leading:] for shape in shapes}) == 1


def _tensor(name: str, value: Any, where: str = "") -> torch.Tensor:
    """The tensor that is kept; of the tuple that a module returned (those of attention do) the first, as is the custom."""
    first = value[0] if isinstance(value, list | tuple) and value and not where else value
    if isinstance(first, torch.Tensor):
        return first
    raise InvalidInput(
        f"{name} is not a tensor",
        where=where,
        why=f"it is of type {type(value).__name__}",
        next="write one of its entries" if where else "capture a module within it",
    )


class Captor:
    """Makes arrays of what a graph has kept; `overflows` counts, by capture, finite values that the dtype cannot hold."""

    def __init__(self, captures: Sequence[CaptureSpec]) -> None:
        self._captures = {capture.name: capture for capture in captures}
        self.overflows: Counter[str] = Counter()

    def stored(self, name: str, value: Any, wanted: Sequence[Index]) -> npt.NDArray[Any]:
        """Rows of a value that was kept of a forward, as they are stored: ``[rows, …]``.

        bfloat16 comes as its bits in uint16. Only these rows are converted, copied from a GPU, and held by the array; where
        nothing is to be done, they are the value's own memory, into which nobody writes any more.

        Parameters
        ----------
        wanted
            Where the rows are in ``[documents, longest, …]``, or ``[documents, …]``: one or more, in their order.
        """
        capture, found = self._captures[name], _tensor(name, value).detach()
        rows, dtype = _rows(found, wanted, _LEADING[capture.rows]), getattr(torch, capture.dtype)
        converted = rows.to(dtype)
        if converted.dtype != rows.dtype and (infinite := converted.isinf()).any():
            self.overflows[name] += int((infinite & rows.isfinite()).sum())
        stored = converted.cpu()
        array: npt.NDArray[Any] = (stored.view(torch.uint16) if dtype is torch.bfloat16 else stored).numpy()
        return array


def _rows(value: torch.Tensor, wanted: Sequence[Index], leading: int) -> torch.Tensor:
    """The wanted rows ``[rows, …]`` of a value whose rows make up so many leading dimensions; a copy unless it is all rows."""
    parts = [value[index] for index in wanted]
    if sum(map(len, parts)) == math.prod(value.shape[:leading]):
        return value.flatten(0, leading - 1)
    return torch.cat(parts)


def bytes_of(captures: Iterable[CaptureSpec], tokens: int, documents: int) -> int:
    """Of all captures of so many tokens and documents."""
    rows = {"token": tokens, "document": documents}
    return sum(rows[capture.rows] * row_bytes(capture) for capture in captures)


def row_bytes(capture: CaptureSpec) -> int:
    """Bytes of a row."""
    return math.prod(capture.width_shape) * physical_dtype(capture.dtype).itemsize


def batch_of(documents: Sequence[npt.NDArray[np.int32]], padding: int) -> dict[str, torch.Tensor]:
    """Documents as the model's inputs, padded on the right.

    There a causal model's values do not depend on the padding, and positions count from 0 as for the document alone.
    """
    longest = max(len(document) for document in documents)
    ids = torch.full((len(documents), longest), padding, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, document in enumerate(documents):
        ids[row, : len(document)] = torch.from_numpy(document)
        mask[row, : len(document)] = 1
    positions = torch.arange(longest).expand(len(documents), -1)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
