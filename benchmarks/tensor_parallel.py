"""MPI ranks of this machine: collectives through our process group, and a split model beside the same one in one process.

All-reduces: two ranks, through our group, by mpi4py alone, and by gloo. For bfloat16, which MPI cannot add, "mpi4py alone"
reduces as many float32 numbers. Below 256 KiB the calls through Python (10 to 20 us) weigh more than the bytes: those ratios
have no goal.

The model: a Llama of 110 million random float32 weights (12 layers, width 768), on one thread a rank, 64 tokens. One
process, all ranks, and all ranks with the guard's words take turns in one run, as do forwards that read split and whole points.
Four ranks on two cores cannot be faster than one process: they show that it works, and what waiting costs. Eight requests of
12 tokens, which read a point of every layer, run one by one and in one forward.

Best of many, each way in turn, in the same ranks. ``--quick`` leaves four ranks out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from figures import Figure, main

if TYPE_CHECKING:
    from collections.abc import Iterator

_COMMAND = ["mpirun", "--oversubscribe", "--allow-run-as-root", "--bind-to", "none"]
_LARGE = 256 << 10
_LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "tie_word_embeddings": True,
}
_TOKENS = 64
_OF_THE_LIMIT = 0.85
"""How many times as many requests a second there are where some share a forward, of what the bare model gains by that."""


def measure(quick: bool) -> Iterator[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        collectives = _on_ranks(2, "tensor_parallel_ranks.py", scratch, int(quick))
        yield from _collectives(collectives)
        model = _model(scratch / "model")
        for ranks, seconds in ((2, 10),) if quick else ((2, 60), (4, 30)):
            took = _on_ranks(ranks, "tensor_parallel_model.py", scratch, model, _TOKENS, seconds)
            yield from _forwards(ranks, took)
            if ranks == 2:
                yield from _guard(took, collectives["word"])
                yield from _split_points(took)
            yield from _shared_forwards(ranks, took)


def _on_ranks(ranks: int, script: str, scratch: Path, *arguments: object) -> Any:
    """What rank 0 of a script writes."""
    answer = scratch / "answer.json"
    program = [sys.executable, "-m", "mpi4py", str(Path(__file__).with_name(script)), str(answer), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*_COMMAND, "-np", str(ranks), *program], check=True, env=environment)
    return json.loads(answer.read_text())


def _model(folder: Path) -> Path:
    import torch  # noqa: PLC0415 - seconds, which --help need not wait for
    from transformers import LlamaConfig, LlamaForCausalLM, logging  # noqa: PLC0415

    torch.manual_seed(0)
    logging.disable_progress_bar()
    LlamaForCausalLM(LlamaConfig(**_LLAMA)).save_pretrained(folder)
    return folder


def _collectives(measured: Any) -> Iterator[Figure]:
    for dtype, size, raw, ours, gloo in measured["all_reduce"]:
        name = f"{dtype}, {size >> 10} KiB"
        yield Figure(f"{name}: ours / mpi4py", ours / raw, 1.5 if size >= _LARGE else None, "<=", f"{raw:.0f} us")
        yield Figure(f"{name}: gloo / ours", gloo / ours, 1.0, ">=", f"{gloo:.0f} us")
    yield Figure("a word of the guard, us", measured["word"], None, "<=", "")
    yield Figure("a word / mpi4py", measured["word"] / measured["integers"], 4, "<=", "an all-reduce of three integers")


def _forwards(ranks: int, took: Any) -> Iterator[Figure]:
    alone, forward = took["alone"], took["unguarded"]
    against = f"{1e3 * alone:.0f} ms; {os.cpu_count()} cores"
    yield Figure(f"forward: {ranks} ranks / one process", forward / alone, None, "<=", against)


def _guard(took: Any, word: float) -> Iterator[Figure]:
    forward, words = took["unguarded"], took["words"]
    yield Figure("forward: with the guard / without", took["guarded"] / forward, 1.02, "<=", f"{1e3 * forward:.0f} ms")
    yield Figure(f"{words} words of the guard / forward", 1e-6 * words * word / forward, 0.02, "<=", "")


def _split_points(took: Any) -> Iterator[Figure]:
    forward, (site, root, bare) = (
        took["unguarded"],
        (took[name] / took["times"] for name in ("everywhere", "root", "bare")),
    )
    size = f"{took['bytes'] >> 10} KiB"
    yield Figure(
        "a split point, whole on all ranks / forward", site / forward, None, "<=", f"{size}, {1e6 * site:.0f} us"
    )
    yield Figure("a split point, whole on all ranks / all-gather", site / bare, None, "<=", f"{1e6 * bare:.0f} us")
    yield Figure("a split point: rank 0 alone / all ranks", root / site, None, "<=", "")
    graphs = f"a mean of one in each of {took['layers']} layers"
    yield Figure("a graph that reads split points / whole ones", took["split"] / took["whole"], None, "<=", graphs)


def _shared_forwards(ranks: int, took: Any) -> Iterator[Figure]:
    def times(way: str) -> float:
        return took[f"{way}, one by one"] / took[f"{way}, shared"]

    name = f"{ranks} ranks, {took['requests']} requests in one forward"
    yield Figure(f"{name} [times], the forwards alone", times("bare"), None, ">=", "one prompt in each")
    for read in ("whole", "split"):
        against = f"one by one: {1e3 * took[f'{read}, one by one']:.0f} ms"
        yield Figure(f"{name} [times], {read} points", times(read), None, ">=", against)
        yield Figure(
            f"{name}, {read} points / limit", times(read) / times("bare"), _OF_THE_LIMIT, ">=", "the forwards alone"
        )


if __name__ == "__main__":
    main(measure, __doc__)
