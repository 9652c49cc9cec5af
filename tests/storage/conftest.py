"""Datasets for the tests: random rows of every dtype, written through the real writer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from nnsight_hpc.storage import ActivationDataset, CaptureSpec, DatasetWriter, Provenance, TokenTable
from nnsight_hpc.storage.schema import physical_dtype

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from random import Random

    import numpy.typing as npt

    Data = dict[str, tuple[str, npt.NDArray[Any]]]


@pytest.fixture
def random_rows() -> Callable[..., npt.NDArray[Any]]:
    """Rows of random bits in the dtype that stores `logical`, so that NaN, infinities and subnormals are among them."""

    def make(logical: str, shape: tuple[int, ...], seed: int = 0) -> npt.NDArray[Any]:
        dtype = physical_dtype(logical)
        size = int(np.prod(shape)) * dtype.itemsize
        return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8).view(dtype).reshape(shape)

    return make


@pytest.fixture
def token_table() -> Callable[..., TokenTable]:
    """A corpus of `rows` tokens in documents of up to 100 tokens, some of them empty."""

    def make(rows: int) -> TokenTable:
        random = np.random.default_rng(rows)
        cuts = np.sort(random.integers(0, rows + 1, rows // 50))
        offset = np.concatenate([[0], cuts, [rows]])
        return TokenTable(random.integers(0, 50000, rows), offset, [f"doc-{i}-é" for i in range(len(offset) - 1)])

    return make


@pytest.fixture
def create(token_table: Callable[..., TokenTable]) -> Callable[..., DatasetWriter]:
    """Create the dataset that shall hold `data`, a dict of name to (logical dtype, rows)."""

    def make(path: Path, data: Data, **options: Any) -> DatasetWriter:
        captures = [CaptureSpec(name, rows.shape[1:], dtype) for name, (dtype, rows) in data.items()]
        tokens = token_table(len(next(iter(data.values()))[1]))
        return DatasetWriter.create(
            path, captures=captures, tokens=tokens, provenance=Provenance(model="test"), **options
        )

    return make


@pytest.fixture
def write_slice() -> Callable[..., None]:
    """Write one slice of `data`, in blocks of 300 rows."""

    def write(writer: DatasetWriter, number: int, data: Data) -> None:
        with writer.slice(number) as s:
            for at in range(s.range.start, s.range.stop, 300):
                for name, (_, rows) in data.items():
                    s.write(name, at, rows[at : min(at + 300, s.range.stop)])

    return write


@pytest.fixture
def write_shuffled() -> Callable[..., None]:
    """Write `rows` as the capture `x`, and finish: slices, and blocks in each, in the order that `order` makes."""

    def write(writer: DatasetWriter, rows: npt.NDArray[Any], block: int, order: Random) -> None:
        parts = writer.pending()
        order.shuffle(parts)
        for part in parts:
            starts = list(range(part.start, part.stop, block))
            order.shuffle(starts)
            with writer.slice(part.number) as s:
                for at in starts:
                    s.write("x", at, rows[at : min(at + block, part.stop)])
        writer.finish()

    return write


@pytest.fixture
def write_dataset(
    create: Callable[..., DatasetWriter], write_slice: Callable[..., None]
) -> Callable[..., ActivationDataset]:
    """Write `data` as a complete dataset and open it."""

    def write(path: Path, data: Data, **options: Any) -> ActivationDataset:
        writer = create(path, data, **options)
        for part in writer.pending():
            write_slice(writer, part.number, data)
        writer.finish()
        return ActivationDataset(path)

    return write
