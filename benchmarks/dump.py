"""A dump beside what bounds it: the bare forward of the same batches, and a raw file of the same bytes on the same disk.

Where the model is large (a random Llama of 110 million parameters), tokens a second of a dump beside those of the model on
the very batches that the dump runs, without hooks, and without the head, which the dump leaves out, too. Where there is next
to nothing to compute (of a wide model, what its embedding gives), bytes a second of a dump beside a raw file, and beside the
ways in which SAELens and TransformerLens keep the same of the same model and corpus: hooks, a buffer, a file for each; they
run nothing behind the embedding either. It is the only point that costs but one pass over memory. Of a thin block the
forward takes about as long as the disk, and of two cores the one that writing needs, too: so it would be measured with it.
"forward alone / raw" says how far the forward is from being the limit.

Everything counts that lies between the call and the bytes on the disk (fsync). The model has one thread. What is compared
takes turns, each round begins with another one, and a figure is the median of the ratios within a round. ``TMPDIR`` names
the disk. SAELens's way needs the package ``datasets`` on the path, in a folder whose name has ``site-packages`` in it.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections import defaultdict
from contextlib import chdir
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from figures import Figure, main
from peers import HAS_SAELENS, save_as_saelens, save_as_transformerlens
from transformers import LlamaConfig, LlamaForCausalLM

from nnsight_hpc import LanguageModel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy.typing as npt

    Save = Callable[[dict[str, torch.Tensor], Path, int], None]

FORWARD_RATIO, DISK_RATIO = 0.95, 0.75
"""Goals: a dump against the bare forward, and against a raw file."""
VOCABULARY, CONTEXT = 1000, 256
LARGE = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
WIDE = {"hidden_size": 4096, "intermediate_size": 16, "num_attention_heads": 1, "num_hidden_layers": 1, "head_dim": 16}
EMBEDDING = "embed_tokens"
BUFFER_BYTES = 128 << 20
"""What others collect in memory before they write a file."""
_RAW_BLOCK = np.random.default_rng(0).bytes(2 << 20)


class Taken(NamedTuple):
    """Seconds of a run, on the clock and of the process's CPU time, by which other programs count for less."""

    wall: float
    cpu: float


class Subject(NamedTuple):
    """A model, the modules whose outputs are kept (paths below ``model``), a corpus, and tokens of a forward."""

    module: torch.nn.Module
    points: tuple[str, ...]
    corpus: Sequence[npt.NDArray[np.int64]]
    batch_tokens: int

    @property
    def tokens(self) -> int:
        return sum(map(len, self.corpus))

    @property
    def bytes(self) -> int:
        """Of everything that is kept."""
        return self.tokens * len(self.points) * self.module.config.hidden_size * 4

    def dump(self, **options: Any) -> None:
        """Into the working folder."""
        model = LanguageModel(self.module)
        with model.dump(self.corpus, name="benchmark", batch_tokens=self.batch_tokens, **options) as d:
            for point in self.points:
                d.write(point, model.get(f"model.{point}").output)

    def batches(self) -> list[dict[str, torch.Tensor]]:
        """What the model is given in each forward of a dump, in its order."""
        seen: list[dict[str, torch.Tensor]] = []
        with self.module.model.register_forward_pre_hook(lambda _m, _a, given: seen.append(given), with_kwargs=True):
            _in_new_folder(lambda _: self.dump())
        found = sum(int(batch["attention_mask"].sum()) for batch in seen)
        while found > self.tokens:  # before the first batch, a dump finds out the shapes of what it keeps
            found -= int(seen.pop(0)["attention_mask"].sum())
        return [{name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")} for batch in seen]

    @torch.no_grad()
    def forward(self, batches: Sequence[dict[str, torch.Tensor]]) -> None:
        """As far as what is kept needs it."""
        for batch in batches:
            if self.points == (EMBEDDING,):
                self.module.model.embed_tokens(batch["input_ids"])
            else:
                self.module.model(**batch, use_cache=False)

    def keep(self, batches: Sequence[dict[str, torch.Tensor]], folder: Path, save: Save) -> None:
        """As others do it: hooks, of some batches a buffer, of each buffer a file."""
        seen: dict[str, list[torch.Tensor]] = defaultdict(list)
        hooks = [
            self.module.model.get_submodule(point).register_forward_hook(_into(seen[point])) for point in self.points
        ]
        at_once = max(1, BUFFER_BYTES * len(batches) // self.bytes)
        for number, start in enumerate(range(0, len(batches), at_once)):
            self.forward(batches[start : start + at_once])
            save({point: torch.cat(parts) for point, parts in seen.items()}, folder, number)
            for parts in seen.values():
                parts.clear()
        for hook in hooks:
            hook.remove()
        _sync(folder)


def measure(quick: bool) -> Iterator[Figure]:
    torch.set_num_threads(1)
    rounds, layers, large, wide = (2, 6, 12, 192) if quick else (5, 12, 16, 768)
    yield from _beside_the_forward(rounds, layers=layers, documents=large)
    yield from _beside_the_disk(rounds, documents=wide)


def _beside_the_forward(rounds: int, *, layers: int, documents: int) -> Iterator[Figure]:
    random = np.random.default_rng(0)
    module, points = _llama({**LARGE, "num_hidden_layers": layers}), (f"layers.{layers // 2}", f"layers.{layers - 1}")
    corpus = [_document(random, int(length)) for length in random.integers(CONTEXT // 4, 2 * CONTEXT, documents)]
    subject = Subject(module, points, corpus, 2048)
    batches = subject.batches()
    ways = {"forward": lambda _: subject.forward(batches), "dump": lambda _: subject.dump()}
    taken = _take_turns(ways, rounds)
    speed = subject.tokens / statistics.median(forward.wall for forward in taken["forward"])
    parameters = sum(parameter.numel() for parameter in subject.module.model.parameters()) / 1e6
    against = f"{parameters:.0f} M parameters, {len(batches)} batches"
    yield Figure("forward alone, tokens/s", speed, None, ">=", against)
    ratio, of_cpu = _ratio(taken, "forward", "dump"), _ratio(taken, "forward", "dump", "cpu")
    yield Figure("dump / forward, tokens/s", ratio, FORWARD_RATIO, ">=", "the bare forward")
    yield Figure("dump / forward, tokens a second of CPU time", of_cpu, FORWARD_RATIO, ">=", "the bare forward")


def _beside_the_disk(rounds: int, *, documents: int) -> Iterator[Figure]:
    random = np.random.default_rng(0)
    subject = Subject(_llama(WIDE), (EMBEDDING,), [_document(random, CONTEXT) for _ in range(documents)], CONTEXT)
    ragged = subject._replace(corpus=_recut(subject.corpus, random))
    batches = subject.batches()
    ways = {
        "raw": lambda folder: _write_raw(folder / "raw", subject.bytes),
        "forward": lambda _: subject.forward(batches),
        "Zarr": lambda _: subject.dump(),
        "HDF5": lambda _: subject.dump(format="hdf5"),
        "Zarr, documents of many lengths": lambda _: ragged.dump(),
        "TransformerLens": lambda folder: subject.keep(batches, folder, save_as_transformerlens),
    }
    if HAS_SAELENS:
        ways["SAELens"] = lambda folder: subject.keep(batches, folder, save_as_saelens)
    else:
        print("SAELens's way is left out: it needs the package datasets (on PYTHONPATH)")
    taken = _take_turns(ways, rounds, subject.bytes)
    speed = subject.bytes / statistics.median(raw.wall for raw in taken["raw"]) / 1e6
    yield Figure("raw file, MB/s", speed, None, ">=", f"{subject.bytes / 1e6:.0f} MB")
    yield Figure("forward alone / raw", _ratio(taken, "raw", "forward"), None, ">=", "a raw file")
    for name in ("Zarr", "HDF5", "Zarr, documents of many lengths"):
        yield Figure(f"dump to {name} / raw", _ratio(taken, "raw", name), DISK_RATIO, ">=", "a raw file")
        for peer in taken.keys() & {"SAELens", "TransformerLens"}:
            yield Figure(f"dump to {name} / {peer}", _ratio(taken, peer, name), 1, ">=", peer)


def _take_turns(ways: dict[str, Callable[[Path], object]], rounds: int, spare: int = 0) -> dict[str, list[Taken]]:
    """What each way took, by round; `spare`: see `_in_new_folder`."""
    taken: dict[str, list[Taken]] = defaultdict(list)
    names = list(ways)
    for _ in range(rounds):
        for name in names:
            taken[name].append(_in_new_folder(ways[name], spare))
        names.append(names.pop(0))
    return taken


def _in_new_folder(way: Callable[[Path], object], spare: int = 0) -> Taken:
    """Run it with a new folder as its argument and as the working folder.

    So many bytes are used for pages of files before that: a virtual machine's first use of memory costs more than a disk.
    """
    with tempfile.TemporaryDirectory() as name, chdir(name):
        folder = Path(name)
        _write_raw(folder / "spare", spare)
        (folder / "spare").unlink()
        os.sync()  # what others have left in the page cache
        begun, of_cpu = time.perf_counter(), time.process_time()
        way(folder)
        return Taken(time.perf_counter() - begun, time.process_time() - of_cpu)


def _ratio(taken: dict[str, list[Taken]], to: str, what: str, clock: str = "wall") -> float:
    """How many times as fast."""
    pairs = zip(taken[to], taken[what], strict=True)
    return statistics.median(getattr(theirs, clock) / getattr(its, clock) for theirs, its in pairs)


def _llama(sizes: dict[str, int]) -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, num_key_value_heads=sizes["num_attention_heads"], vocab_size=VOCABULARY)
    return LlamaForCausalLM(config).eval().requires_grad_(requires_grad=False)


def _document(random: np.random.Generator, length: int) -> npt.NDArray[np.int64]:
    return random.integers(0, VOCABULARY, length)


def _recut(corpus: Sequence[npt.NDArray[np.int64]], random: np.random.Generator) -> list[npt.NDArray[np.int64]]:
    """The same tokens in as many documents, which are of many lengths."""
    tokens = np.concatenate(corpus)
    return np.split(tokens, np.sort(random.choice(np.arange(1, len(tokens)), len(corpus) - 1, replace=False)))


def _into(seen: list[torch.Tensor]) -> Callable[[Any, Any, Any], None]:
    return lambda _module, _inputs, output: seen.append(output[0] if isinstance(output, tuple) else output)


def _write_raw(path: Path, size: int) -> None:
    with path.open("wb", buffering=0) as file:
        for start in range(0, size, len(_RAW_BLOCK)):
            file.write(memoryview(_RAW_BLOCK)[: size - start])
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


if __name__ == "__main__":
    main(measure, __doc__ or "")
