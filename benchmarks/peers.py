"""How others keep a buffer of activations: one file, or folder, for each."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

HAS_SAELENS = find_spec("datasets") is not None
"""Its cache is written by the package ``datasets``."""


def save_as_saelens(buffer: Mapping[str, torch.Tensor], folder: Path, number: int) -> None:
    """As its `CacheActivationsRunner` does: a `datasets.Dataset` in a folder of its own, of ``[prompts, context, width]``."""
    from datasets import Array2D, Dataset, Features, disable_progress_bars  # noqa: PLC0415 - where it is installed

    disable_progress_bars()
    features = Features(
        {
            name: Array2D(shape=tuple(tensor.shape[1:]), dtype=str(tensor.dtype).removeprefix("torch."))
            for name, tensor in buffer.items()
        }
    )
    Dataset.from_dict(dict(buffer), features=features).save_to_disk(folder / f"shard_{number}", num_shards=1)


def save_as_transformerlens(buffer: Mapping[str, torch.Tensor], folder: Path, number: int) -> None:
    """As its users do: the cache of some batches, a dict of tensors, by `torch.save`."""
    torch.save(dict(buffer), folder / f"{number}.pt")
