"""The ways to keep activations that `storage.py` measures: each writes the same float16 rows, and reads them back in order."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

import h5py
import numpy as np
import torch
import zarr
from peers import HAS_SAELENS, save_as_saelens, save_as_transformerlens
from safetensors import numpy as safetensors

from nnsight_hpc.storage import ActivationDataset, CaptureSpec, DatasetWriter, Provenance, TokenTable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import numpy.typing as npt

WIDTH, CONTEXT = 2048, 256
BLOCK_ROWS, BUFFER_ROWS = 1024, 32768
"""What a batch gives (4 MiB), and what others collect in memory before they write a file (128 MiB)."""
NAME = "x"


class Way(NamedTuple):
    """`write` puts so many rows below a folder; each of `read` gives them back in order, in blocks."""

    write: Callable[[Path, int], None]
    read: dict[str, Callable[[Path], Iterator[npt.NDArray[np.generic]]]]


def ways() -> dict[str, Way]:
    """By name; SAELens's only where the package ``datasets`` is installed, which it writes with."""
    zarr_ = {"": lambda path: _ours(path / "d.zarr"), ", plain zarr-python": _plain_zarr}
    hdf5 = {"": lambda path: _ours(path / "d.hdf5"), ", plain h5py": _plain_hdf5}
    found = {
        "raw": Way(_write_raw, {"": _read_raw}),
        "Zarr": Way(lambda path, rows: _write_ours(path / "d.zarr", rows), zarr_),
        "HDF5": Way(lambda path, rows: _write_ours(path / "d.hdf5", rows), hdf5),
        "SAELens": Way(_write_saelens, {"": _read_saelens}),
        "TransformerLens": Way(_write_transformerlens, {"": _read_transformerlens}),
        "safetensors": Way(_write_safetensors, {"": _read_safetensors}),
        "zarr-python": Way(_write_zarr_python, {"": _read_zarr_python}),
    }
    return found if HAS_SAELENS else {name: way for name, way in found.items() if name != "SAELens"}


_random = np.random.default_rng(0)
_POOL = _random.standard_normal((BUFFER_ROWS, WIDTH), dtype=np.float32).astype(np.float16)


def _blocks(rows: int) -> Iterator[tuple[int, npt.NDArray[np.generic]]]:
    """The rows as batches give them, each with the number of its first."""
    for row in range(0, rows, BLOCK_ROWS):
        at = row % BUFFER_ROWS
        yield row, _POOL[at : at + BLOCK_ROWS]


def _buffers(rows: int) -> Iterator[tuple[int, torch.Tensor]]:
    """The rows as others collect them, numbered: ``[prompts, context, width]``."""
    for number in range(rows // BUFFER_ROWS):
        parts = [torch.from_numpy(block) for _, block in _blocks(BUFFER_ROWS)]
        yield number, torch.cat(parts).reshape(-1, CONTEXT, WIDTH)


def _write_raw(path: Path, rows: int) -> None:
    with (path / "raw").open("wb", buffering=0) as file:
        for _, block in _blocks(rows):
            file.write(block.data)


def _read_raw(path: Path) -> Iterator[npt.NDArray[np.generic]]:
    with (path / "raw").open("rb", buffering=0) as file:
        while True:
            block = np.empty((4 * BLOCK_ROWS, WIDTH), dtype=np.float16)
            count = os.readv(file.fileno(), [block.data])
            if not count:
                return
            yield block[: count // (2 * WIDTH)]


def _write_ours(path: Path, rows: int) -> None:
    writer = DatasetWriter.create(
        path,
        captures=[CaptureSpec(NAME, (WIDTH,), "float16")],
        tokens=TokenTable(np.zeros(rows, dtype=np.int32), np.array([0, rows]), ["document"]),
        provenance=Provenance(model="benchmark"),
    )
    for part in writer.pending():
        with writer.slice(part.number) as opened:
            for row, block in _blocks(part.stop - part.start):
                opened.write(NAME, part.start + row, block)
    writer.finish()


def _ours(path: Path) -> Iterator[npt.NDArray[np.generic]]:
    array = ActivationDataset(path)[NAME]
    return (array[row : row + 4 * BLOCK_ROWS] for row in range(0, len(array), 4 * BLOCK_ROWS))


def _plain_zarr(path: Path) -> Iterator[npt.NDArray[np.generic]]:
    array = zarr.open_array(str(path / "d.zarr" / "activations" / NAME), mode="r")
    return (np.asarray(array[row : row + 4 * BLOCK_ROWS]) for row in range(0, array.shape[0], 4 * BLOCK_ROWS))


def _plain_hdf5(path: Path) -> Iterator[npt.NDArray[np.generic]]:
    with h5py.File(path / "d.hdf5" / "index.h5", "r") as file:
        array = file[f"activations/{NAME}"]
        yield from (array[row : row + 4 * BLOCK_ROWS] for row in range(0, len(array), 4 * BLOCK_ROWS))


def _write_saelens(path: Path, rows: int) -> None:
    for number, buffer in _buffers(rows):
        save_as_saelens({NAME: buffer}, path, number)


def _read_saelens(path: Path) -> Iterator[npt.NDArray[np.generic]]:
    from datasets import concatenate_datasets, load_from_disk  # noqa: PLC0415 - where it is installed

    shards = [load_from_disk(str(shard)) for shard in sorted(path.iterdir())]
    table = concatenate_datasets(shards).with_format("numpy")
    prompts = 4 * BLOCK_ROWS // CONTEXT
    return (table[at : at + prompts][NAME].reshape(-1, WIDTH) for at in range(0, len(table), prompts))


def _write_transformerlens(path: Path, rows: int) -> None:
    for number, buffer in _buffers(rows):
        save_as_transformerlens({NAME: buffer}, path, number)


def _read_transformerlens(path: Path) -> Iterator[npt.NDArray[np.generic]]:
    for file in sorted(path.iterdir()):
        yield torch.load(file)[NAME].reshape(-1, WIDTH).numpy()


def _write_safetensors(path: Path, rows: int) -> None:
    for number, buffer in _buffers(rows):
        safetensors.save_file({NAME: buffer.numpy()}, path / f"{number}.safetensors")


def _read_safetensors(path: Path) -> Iterator[npt.NDArray[np.generic]]:
    for file in sorted(path.iterdir()):
        yield safetensors.load_file(file)[NAME].reshape(-1, WIDTH)


def _write_zarr_python(path: Path, rows: int) -> None:
    """An array of chunks of 1 MiB without compression, written batch by batch."""
    array = zarr.create_array(
        str(path / "plain.zarr"), shape=(rows, WIDTH), chunks=(256, WIDTH), dtype="float16", compressors=None
    )
    for row, block in _blocks(rows):
        array[row : row + BLOCK_ROWS] = block


def _read_zarr_python(path: Path) -> Iterator[npt.NDArray[np.generic]]:
    array = zarr.open_array(str(path / "plain.zarr"), mode="r")
    return (np.asarray(array[row : row + 4 * BLOCK_ROWS]) for row in range(0, array.shape[0], 4 * BLOCK_ROWS))
