"""Run one batch of documents through the model, and take what was captured as NumPy arrays that storage can write."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nnsight_hpc.execution import run_graph
from nnsight_hpc.storage import CaptureSpec
from nnsight_hpc.wire.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy.typing as npt

    from nnsight_hpc.graph import Graph
    from nnsight_hpc.models import Loaded

_FLOATS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
_PROBE = (2, 3)
"""Documents and tokens of the forward that finds out the shapes: two numbers that tell the dimensions apart."""


def probe(graph: Graph, loaded: Loaded, dtype: str) -> tuple[CaptureSpec, ...]:
    """What the captures of `graph` look like: the dimensions after ``[documents, tokens]``, and how they are stored.

    Raises
    ------
    InvalidInput
        `dtype` is none, or a capture is not one tensor with a row for each token.
    """
    if dtype != "auto" and dtype not in _FLOATS:
        raise InvalidInput(f"activations cannot be stored as {dtype!r}", next=f"use auto, {', '.join(_FLOATS)}")
    ids = [np.zeros(_PROBE[1], dtype=np.int32)] * _PROBE[0]
    values = run_graph(graph, _inputs(ids, loaded.tokenizer), loaded.module)
    return tuple(_spec(name, value, dtype) for name, value in values.items())


def _spec(name: str, value: Any, dtype: str) -> CaptureSpec:
    tensor = _tensor(name, value)
    if tuple(tensor.shape[:2]) != _PROBE:
        raise InvalidInput(
            f"{name} has no row for each token",
            why=f"for {_PROBE[0]} documents of {_PROBE[1]} tokens its shape is {list(tensor.shape)}",
            next="capture a module whose value has the shape [documents, tokens, …]",
        )
    stored = dtype if dtype != "auto" and tensor.is_floating_point() else str(tensor.dtype).removeprefix("torch.")
    return CaptureSpec(name, tuple(tensor.shape[2:]), stored)


def _tensor(name: str, value: Any) -> torch.Tensor:
    """The captured tensor; of a tuple (attention modules return one) the first element, as is the custom."""
    first = value[0] if isinstance(value, list | tuple) and value else value
    if isinstance(first, torch.Tensor):
        return first
    raise InvalidInput(
        f"{name} is not a tensor", why=f"it is of type {type(value).__name__}", next="capture a module within it"
    )


class Captor:
    """Runs batches. `overflows` counts, by capture, finite values that the stored dtype cannot hold."""

    def __init__(
        self, graph: Graph, captures: Sequence[CaptureSpec], loaded: Loaded, cancelled: Callable[[], bool]
    ) -> None:
        self._graph, self._loaded, self._cancelled = graph, loaded, cancelled
        self._dtypes = {capture.name: getattr(torch, capture.dtype) for capture in captures}
        self.row_bytes = sum(math.prod(c.width_shape) * self._dtypes[c.name].itemsize for c in captures)
        self.overflows: Counter[str] = Counter()

    def run(self, documents: Sequence[npt.NDArray[np.int32]]) -> Mapping[str, npt.NDArray[Any]]:
        """The captures of documents that share a forward: by name ``[documents, longest, …]``.

        bfloat16 comes as its bits in uint16. Rows of padding (after a document's end) hold no meaning.
        Raises `RequestCancelled` and `ExecutionFailed` as `run_graph` does.
        """
        inputs = _inputs(documents, self._loaded.tokenizer)
        values = run_graph(self._graph, inputs, self._loaded.module, cancelled=self._cancelled)
        return {name: self._stored(name, _tensor(name, value), inputs) for name, value in values.items()}

    def _stored(self, name: str, value: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> npt.NDArray[Any]:
        wanted = self._dtypes[name]
        converted = value.to(wanted)
        if converted.dtype != value.dtype:
            lost = (converted.isinf() & value.isfinite())[inputs["attention_mask"].bool().to(value.device)]
            self.overflows[name] += int(lost.sum())
        stored = converted.cpu()
        array: npt.NDArray[Any] = (stored.view(torch.uint16) if wanted is torch.bfloat16 else stored).numpy()
        return array


def _inputs(documents: Sequence[npt.NDArray[np.int32]], tokenizer: Any) -> dict[str, torch.Tensor]:
    """Documents as the model's inputs, padded on the right.

    There a causal model's values do not depend on the padding, and positions count from 0 as for the document alone.
    """
    longest = max(len(document) for document in documents)
    padding = getattr(tokenizer, "pad_token_id", None) or 0
    ids = torch.full((len(documents), longest), padding, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, document in enumerate(documents):
        ids[row, : len(document)] = torch.from_numpy(document)
        mask[row, : len(document)] = 1
    positions = torch.arange(longest).expand(len(documents), -1)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
