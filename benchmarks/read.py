"""Batches of activations from disk: ours beside a memory-mapped array of the same bytes, zarr-python, and SAELens's way.

Batches of 4,096 rows as tensors of their own memory, in order and shuffled, warm (in the page cache) and cold (dropped from
it before each run, and when shuffled before each of 32 batches, as it is with data much larger than memory; what lies below,
a disk of a virtual machine for one, may have a cache of its own). Shuffled means for the memory map and
zarr-python single random rows, the perfect order; for ours blocks through a buffer of 32,768 rows; for SAELens, whose
cached activations are a Hugging Face dataset of whole prompts, its mixing buffer of as many rows (left out where `datasets`
is not installed). MiB/s, best of the rounds, in which the ways take turns.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import zarr
from figures import Figure, main

from nnsight_hpc.storage import ActivationDataset, CaptureSpec, DatasetWriter, Provenance, TokenTable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy.typing as npt

    Read = Callable[[bool], Iterator[torch.Tensor]]

WIDTH, BATCH, BUFFER, PROMPT = 2048, 4096, 32768, 128
QUICK_ROWS, ROWS = 1 << 16, 1 << 18
BLOCK = 1 << 14
COLD_BATCHES = 32
RANDOM_ROWS = 1 << 9  # of zarr-python, which reads a chunk for each
GOALS = {("warm", "in order"): 0.5, ("warm", "shuffled"): 0.2, ("cold", "in order"): 0.6, ("cold", "shuffled"): 1.0}
"""Ours / the memory map. Warm, a random row of a map is copied once; one that goes through a buffer three times."""


def measure(quick: bool) -> Iterator[Figure]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        files = Files(Path(folder), QUICK_ROWS if quick else ROWS)
        ways: dict[str, Read] = {"ours": files.ours, "memory map": files.memory_map, "zarr-python": files.zarr_python}
        if importlib.util.find_spec("datasets"):
            ways["SAELens"] = SAELens(Path(folder), files.rows).batches
        os.sync()  # pages that are not on the disk yet cannot be dropped
        for temperature, order in GOALS:
            yield from _compare(files, ways, temperature, order, rounds=1 if quick else 2)
        yield from _overlap(files)


def _compare(files: Files, ways: dict[str, Read], temperature: str, order: str, *, rounds: int) -> Iterator[Figure]:
    best = dict.fromkeys(ways, 0.0)
    shuffle, cold = order == "shuffled", temperature == "cold"
    for _ in range(rounds):
        for name, read in ways.items():
            if cold:
                files.drop()
            batches = itertools.islice(read(shuffle), COLD_BATCHES if cold and shuffle else None)
            best[name] = max(best[name], _speed(batches, files.drop if cold and shuffle else lambda: None))
    case = f"{temperature}, {order}"
    for name, speed in best.items():
        yield Figure(f"{case}: {name} [MiB/s]", speed, None, ">=", "")
    for name in list(best)[1:]:
        goal = {"memory map": GOALS[temperature, order], "SAELens": 1.0 if shuffle else None}.get(name, 1.0)
        yield Figure(f"{case}: ours / {name}", best["ours"] / best[name], goal, ">=", name)


def _overlap(files: Files) -> Iterator[Figure]:
    """A training step that takes as long as a shuffled batch: together, beside one after the other."""
    weights, batches = torch.randn(WIDTH, 64), files.rows // BATCH
    reading = _seconds(lambda: [None for _ in files.ours(True)])
    one = _seconds(lambda: torch.randn(BATCH, WIDTH) @ weights)
    steps = max(1, round(reading / batches / one))

    def train(batch: torch.Tensor) -> None:
        for _ in range(steps):
            batch @ weights

    fixed = torch.randn(BATCH, WIDTH)
    training = _seconds(lambda: [train(fixed) for _ in range(batches)])
    together = _seconds(lambda: [train(fixed) for _ in files.ours(True)])
    yield Figure("reading ahead: together / one after the other", together / (reading + training), 0.85, "<=", "")


class Files:
    """The same rows in every format, and how each is read."""

    def __init__(self, folder: Path, rows: int) -> None:
        self.folder, self.rows = folder, rows
        self.dataset = _write_dataset(folder / "ours.zarr", rows)
        self.raw = folder / "rows.bin"
        with self.raw.open("wb") as file:
            for block in _blocks(rows):
                file.write(block.data)
            os.fsync(file.fileno())

    def ours(self, shuffle: bool) -> Iterator[torch.Tensor]:
        for batch in self.dataset.to_torch(batch_size=BATCH, shuffle=shuffle, buffer_rows=BUFFER):
            yield batch["x"]

    def memory_map(self, shuffle: bool) -> Iterator[torch.Tensor]:
        rows = np.memmap(self.raw, dtype=np.float16, mode="r", shape=(self.rows, WIDTH))
        order = np.random.default_rng(0).permutation(self.rows) if shuffle else None
        for at in range(0, self.rows, BATCH):
            part = slice(at, at + BATCH)
            yield torch.from_numpy(np.array(rows[part]) if order is None else rows[order[part]])

    def zarr_python(self, shuffle: bool) -> Iterator[torch.Tensor]:
        array = zarr.open_array(str(self.folder / "ours.zarr" / "activations" / "x"), mode="r")
        if not shuffle:
            for at in range(0, self.rows, BATCH):
                yield torch.from_numpy(np.asarray(array[at : at + BATCH]))
            return
        order = np.random.default_rng(0).permutation(self.rows)[:RANDOM_ROWS]
        yield torch.from_numpy(np.asarray(array.oindex[np.sort(order)]))

    def drop(self) -> None:
        """Out of the page cache."""
        for file in self.folder.rglob("*"):
            if file.is_file():
                with file.open("rb") as opened:
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class SAELens:
    """Cached activations as SAELens 6 has them: Arrow files of prompts ``[PROMPT, WIDTH]``, sliced, and a mixing buffer."""

    def __init__(self, folder: Path, rows: int) -> None:
        from datasets import Array2D, Dataset, Features, load_from_disk  # noqa: PLC0415

        features, whole = Features({"x": Array2D((PROMPT, WIDTH), "float16")}), folder / "sae"
        files = []
        for number, block in enumerate(_blocks(rows)):
            part = Dataset.from_dict({"x": block.reshape(-1, PROMPT, WIDTH)}, features=features)
            part.save_to_disk(str(folder / "part"))
            whole.mkdir(exist_ok=True)
            files.append({"filename": f"data-{number:05d}.arrow"})
            next((folder / "part").glob("*.arrow")).rename(whole / files[-1]["filename"])
        state = json.loads((folder / "part" / "state.json").read_text())
        (whole / "state.json").write_text(json.dumps(state | {"_data_files": files}))
        (folder / "part" / "dataset_info.json").rename(whole / "dataset_info.json")
        self._dataset = load_from_disk(str(whole))
        self._dataset.set_format(type="torch", columns=["x"], dtype=torch.float16)

    def batches(self, shuffle: bool) -> Iterator[torch.Tensor]:
        return self._mixed() if shuffle else self._in_order()

    def _in_order(self) -> Iterator[torch.Tensor]:
        prompts = BATCH // PROMPT
        for at in range(0, len(self._dataset), prompts):
            yield self._dataset[at : at + prompts]["x"].reshape(-1, WIDTH)

    def _mixed(self) -> Iterator[torch.Tensor]:
        """Half of a full, shuffled buffer is served; the other half waits for what comes next."""
        buffer = torch.empty(0, WIDTH, dtype=torch.float16)
        for new in self._in_order():
            buffer = torch.cat([buffer, new])
            if len(buffer) >= BUFFER:
                buffer = buffer[torch.randperm(len(buffer))]
                served, buffer = buffer[: BUFFER // 2], buffer[BUFFER // 2 :]
                yield from served.split(BATCH)
        yield from buffer.split(BATCH)


def _blocks(rows: int) -> Iterator[npt.NDArray[np.float16]]:
    """The same random block again and again: nothing here compresses."""
    block = np.random.default_rng(0).standard_normal((BLOCK, WIDTH), dtype=np.float32).astype(np.float16)
    for _ in range(0, rows, BLOCK):
        yield block


def _write_dataset(path: Path, rows: int) -> ActivationDataset:
    tokens = TokenTable(np.zeros(rows, dtype=np.int32), np.array([0, rows]), ["all"])
    captures = [CaptureSpec("x", (WIDTH,), "float16")]
    writer = DatasetWriter.create(path, captures=captures, tokens=tokens, provenance=Provenance(model="random"))
    blocks = _blocks(rows)
    for part in writer.pending():
        with writer.slice(part.number) as s:
            for at in range(part.start, part.stop, BLOCK):
                s.write("x", at, next(blocks))
    writer.finish()
    return ActivationDataset(path)


def _speed(batches: Iterator[torch.Tensor], before: Callable[[], None]) -> float:
    """MiB/s; what is done before each batch is not counted."""
    seconds, size = 0.0, 0
    while True:
        before()
        begun = time.perf_counter()
        batch = next(batches, None)
        seconds += time.perf_counter() - begun
        if batch is None:
            return size / 2**20 / seconds
        size += batch.nbytes


def _seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main(measure, __doc__ or "")
