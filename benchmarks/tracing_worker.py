"""Measures one library for `tracing.py`: reads what to run as JSON lines, answers with seconds of CPU time.

    python tracing_worker.py LIBRARY SMOLLM2_FOLDER

A request is ``{"model", "case", "repeat"}``, the answer ``{"hooks", "traced"}``: seconds a call, each by hooks on the
unwrapped model and by the library on its own copy. Before the first one of a case both are run and compared.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import warnings
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import tracing_hooks
from tracing_models import Subject, build

if TYPE_CHECKING:
    from torch import nn

LIBRARY, SMOLLM2 = sys.argv[1:]
traced = importlib.import_module(f"tracing_{LIBRARY}")


@cache
def subject(name: str) -> Subject:
    return build(name, traced.wrap, SMOLLM2)


@cache
def checked(model: str, case: str) -> None:
    """Run the case both ways; raises when the results differ, or, untraced, when the wrapped module is not as before."""
    on = subject(model)
    by_hand, by_library = (getattr(module, case)(on) for module in (tracing_hooks, traced))
    if case not in ("empty", "untraced"):
        torch.testing.assert_close(by_library, by_hand, atol=1e-4, rtol=1e-3)
    if case == "untraced" and (changed := changes(on.plain, traced.module_of(on.wrapped))):
        raise RuntimeError(f"wrapping changed {', '.join(changed)}")


def changes(plain: nn.Module, wrapped: nn.Module) -> list[str]:
    """Where a wrapped module differs from its unwrapped copy: class, attributes, hooks."""
    pairs = zip(plain.named_modules(), wrapped.named_modules(), strict=True)
    return [path or "the model" for (path, one), (_, other) in pairs if _shape(one) != _shape(other)]


def _shape(module: nn.Module) -> tuple[Any, ...]:
    return type(module), {key: len(value) if "hooks" in key else 0 for key, value in vars(module).items()}


def measure(model: str, case: str, repeat: int) -> dict[str, float]:
    """CPU seconds of one call each way, of `repeat` in turn."""
    checked(model, case)
    on, spent = subject(model), {"hooks": 0.0, "traced": 0.0}
    functions = {"hooks": getattr(tracing_hooks, case), "traced": getattr(traced, case)}
    for _ in range(repeat):
        for which, function in functions.items():
            before = time.process_time()
            function(on)
            spent[which] += time.process_time() - before
    return {which: total / repeat for which, total in spent.items()}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        return measure(**request)
    except Exception as error:  # noqa: BLE001 - a library that cannot do a case is a result
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints is no answer
    print(json.dumps({"version": traced.VERSION}), file=answers)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers)


if __name__ == "__main__":
    main()
