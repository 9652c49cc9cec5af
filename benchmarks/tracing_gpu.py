"""What tracing costs on a GPU on top of the model: wall time as a ratio to hand-written hooks, and how often each waits.

The cases are those of `tracing.py`, the models its GPT-2s, and a wide one that keeps the GPU busy (bfloat16, 96 tokens).
A call is timed until the GPU has done all of it; hooks run on an unwrapped copy of the same model, in turn with the traces.
A wait is an operation that blocks Python until the GPU has caught up (`torch.cuda.set_sync_debug_mode`).
"""

from __future__ import annotations

import math
import os
import time
import warnings
from statistics import median
from typing import TYPE_CHECKING

import torch
import tracing_hooks
import tracing_models
import tracing_ours
from figures import Figure, main
from tracing import CASES, MODELS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tracing_models import Subject

GPU = os.environ.get("NNSIGHT_HPC_TEST_DEVICE", "cuda")
NAMES = {
    **{name: title for name, (title, _goal) in MODELS.items() if name.startswith("gpt2")},
    "wide": "GPT-2, width 2048, bfloat16",
}


def subject(name: str) -> Subject:
    """A subject of `tracing_models` on the GPU."""
    made = tracing_models.build("gpt2 2048" if name == "wide" else name, tracing_ours.wrap, "")
    dtype = torch.bfloat16 if name == "wide" else torch.float32
    for module in (made.plain, tracing_ours.module_of(made.wrapped)):
        module.to(GPU, dtype)
    tokens = 96 if name == "wide" else tracing_models.TOKENS
    ids = torch.randint(3, tracing_models.VOCABULARY, (1, tokens))
    made.inputs = {"input_ids": ids.to(GPU), "attention_mask": torch.ones_like(ids).to(GPU)}
    return made


def seconds(call: Callable[[Subject], object], on: Subject) -> float:
    torch.cuda.synchronize()
    begun = time.perf_counter()
    call(on)
    torch.cuda.synchronize()
    return time.perf_counter() - begun


def waits(call: Callable[[Subject], object], on: Subject) -> list[str]:
    """The lines at which a call waits for the GPU."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        call(on)
        torch.cuda.set_sync_debug_mode("default")
    return [f"{w.filename.rpartition('/')[2]}:{w.lineno}" for w in caught if "synchronizing CUDA" in str(w.message)]


def row(name: str, case: str, on: Subject, rounds: int) -> Iterator[Figure]:
    by_hand, traced = getattr(tracing_hooks, case), getattr(tracing_ours, case)
    for call in (by_hand, traced) * 3:
        call(on)  # kernels are chosen and loaded at the first call
    pairs = [(seconds(by_hand, on), seconds(traced, on)) for _ in range(rounds)]
    hooks, ours = (median(times) for times in zip(*pairs, strict=True))
    ratio = median(traced / hooks for hooks, traced in pairs)
    yield Figure(
        f"{NAMES[name]}: {CASES[case]}", ratio, None, "<=", f"hooks, {1e3 * hooks:.3g} ms; ours {1e3 * ours:.3g} ms"
    )
    plain, found = waits(by_hand, on), waits(traced, on)
    where = ", ".join(sorted({*found})) if len(found) > len(plain) else ""
    yield Figure("  waits", len(found), len(plain), "<=", f"hooks: {len(plain)} {where}")


def measure(quick: bool) -> Iterator[Figure]:
    if not torch.cuda.is_available():
        yield Figure("no CUDA GPU: nothing was measured", math.nan, 0, "<=", "")
        return
    for name in NAMES:
        on = subject(name)
        for case in CASES:
            slow = 4 if case == "generate" else 1
            yield from row(name, case, on, (20 if quick else 200) // slow)


if __name__ == "__main__":
    main(measure, __doc__ or "")
