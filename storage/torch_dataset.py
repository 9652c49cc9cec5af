"""The dataset as a `torch.utils.data.IterableDataset`; the one module of this package that loads torch.

The rows of an epoch are shared out in blocks (in order: in batches) to the worker processes of all ranks; each mixes its
own. Outside of worker processes a thread prepares the next batch; a `DataLoader`'s workers run ahead by themselves.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from nnsight_hpc.storage.ahead import read_ahead
from nnsight_hpc.storage.mixing import in_order, mixed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import numpy.typing as npt

    from nnsight_hpc.storage.arrays import StoredArray
    from nnsight_hpc.storage.mixing import Batch
    from nnsight_hpc.storage.selection import Selection


class TorchBatches(IterableDataset[dict[str, torch.Tensor]]):  # type: ignore[misc]  # mypy does not follow torch
    """Batches ``{name: tensor [n, *width]}``; made by `ActivationDataset.to_torch`.

    Every row comes exactly once an epoch, also with several workers of a `DataLoader`, which then share out the blocks
    and the rows of the buffer among them. Give the `DataLoader` ``batch_size=None``.
    """

    def __init__(
        self,
        arrays: Mapping[str, StoredArray],
        selection: Selection,
        *,
        batch_size: int,
        shuffle: bool,
        seed: int,
        buffer_rows: int,
        drop_last: bool,
        rank: int,
        world: int,
    ) -> None:
        super().__init__()
        self._arrays, self._selection = dict(arrays), selection
        self._batch_size, self._shuffle, self._seed, self._buffer_rows = batch_size, shuffle, seed, buffer_rows
        self._drop_last, self._rank, self._world = drop_last, rank, world
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers see it change

    @property
    def rows(self) -> int:
        """How many rows an epoch has, on all ranks together."""
        return self._selection.rows

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next epoch, which follows from `seed` and `epoch` (0 at first)."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        info = get_worker_info()
        batches = self._batches(*((info.id, info.num_workers) if info else (0, 1)))
        for batch in batches if info else read_ahead(batches):
            yield {name: _tensor(values) for name, values in batch.items()}

    def _batches(self, worker: int, workers: int) -> Iterator[Batch]:
        """What this worker of this rank yields; `full` is how many full batches its like on each rank has."""
        parts = [slice(worker * self._world + rank, None, self._world * workers) for rank in range(self._world)]
        if self._shuffle:
            batches, full = self._mixed(parts, self._buffer_rows // workers)
        else:
            batches, full = self._in_order(parts)
        return itertools.islice(batches, min(full)) if self._drop_last else batches

    def _mixed(self, parts: list[slice], buffer_rows: int) -> tuple[Iterator[Batch], list[int]]:
        key, counts = (self._seed, int(self._epoch)), self._selection.counts
        order = np.random.default_rng(key).permutation(np.flatnonzero(counts))
        full = [int(counts[order[part]].sum()) // self._batch_size for part in parts]
        mine = parts[self._rank]
        batches = mixed(
            self._arrays,
            self._selection,
            order[mine],
            batch_size=self._batch_size,
            buffer_rows=buffer_rows,
            random=np.random.default_rng((*key, mine.start)),
        )
        return batches, full

    def _in_order(self, parts: list[slice]) -> tuple[Iterator[Batch], list[int]]:
        numbers = range(-(-self.rows // self._batch_size))
        full = [len(numbers[: self.rows // self._batch_size][part]) for part in parts]
        return in_order(self._arrays, self._selection, numbers[parts[self._rank]], self._batch_size), full


def _tensor(values: npt.NDArray[Any]) -> torch.Tensor:
    if values.dtype.name == "bfloat16":
        return torch.from_numpy(values.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(values)
