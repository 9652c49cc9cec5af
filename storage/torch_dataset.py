"""The dataset as a `torch.utils.data.IterableDataset`; the one module of this package that loads torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from nnsight_hpc.storage.layout import BLOCK_ROWS
from nnsight_hpc.storage.mixing import cut, in_order, mixed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy.typing as npt

    from nnsight_hpc.storage.arrays import StoredArray


class TorchBatches(IterableDataset[dict[str, torch.Tensor]]):  # type: ignore[misc]  # mypy does not follow torch
    """Batches ``{name: tensor [n, *width]}``; made by `ActivationDataset.to_torch`.

    Every row comes exactly once an epoch, also with several workers of a `DataLoader`, which then share out the blocks
    and the rows of the buffer among them. Give the `DataLoader` ``batch_size=None``.
    """

    def __init__(
        self,
        arrays: Mapping[str, StoredArray],
        present: Sequence[tuple[int, int]],
        *,
        batch_size: int,
        shuffle: bool,
        seed: int,
        buffer_rows: int,
    ) -> None:
        super().__init__()
        self._arrays, self._present = dict(arrays), list(present)
        self._batch_size, self._shuffle, self._seed, self._buffer_rows = batch_size, shuffle, seed, buffer_rows
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # persistent workers see it change

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next epoch, which follows from `seed` and `epoch` (0 at first)."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        for batch in self._batches(worker, workers):
            yield {name: _tensor(values) for name, values in batch.items()}

    def _batches(self, worker: int, workers: int) -> Iterator[dict[str, npt.NDArray[Any]]]:
        if not self._shuffle:
            return in_order(self._arrays, cut(self._present, self._batch_size)[worker::workers])
        key = (self._seed, int(self._epoch))
        blocks = cut(self._present, BLOCK_ROWS)
        order = np.random.default_rng(key).permutation(len(blocks))
        mine = [blocks[i] for i in order[worker::workers]]
        random = np.random.default_rng((*key, worker))
        return mixed(self._arrays, mine, self._batch_size, self._buffer_rows // workers, random)


def _tensor(values: npt.NDArray[Any]) -> torch.Tensor:
    if values.dtype.name == "bfloat16":
        return torch.from_numpy(values.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(values)
