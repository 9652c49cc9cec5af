"""What tracing costs on top of the model: CPU time as a ratio to hand-written hooks, for us and for nnsight.

Hooks run on an unwrapped copy of the same model, in the same process, in turn with the library; the two libraries have a
process each and take turns, too. Figures are medians of ratios, on one thread. The GPT-2s and the MLP are random, with a
vocabulary of 1,000 tokens, and see 16 tokens (8 rows). ``--quick`` leaves
SmolLM2 out, and generation with the wide GPT-2.

nnsight is the newest on PyPI, installed by the first run into ``.cache/benchmark-nnsight`` (remove that to get a newer one):
a virtual environment that sees the packages of this one.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import sysconfig
import venv
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import median
from time import monotonic
from typing import TYPE_CHECKING, Any

from figures import Figure, main

from nnsight_hpc.models.smollm2 import default_folder, prepare

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self

HERE = Path(__file__).parent
NNSIGHT = HERE.parent / ".cache" / "benchmark-nnsight"
CASES = {
    "save_last": "save the last layer",
    "save_third": "save the end of the first third",
    "save_all": "save all layers",
    "operations": "30 operations on one layer",
    "patch": "patching with two invokes",
    "generate": "generation, saving each step",
    "gradient": "a gradient",
    "empty": "an empty trace",
    "untraced": "wrapped, not traced",
}
MODELS = {
    "gpt2 768": ("GPT-2, width 768", 1.03),
    "gpt2 64": ("GPT-2, width 64", 1.15),
    "mlp": ("MLP", None),
    "smollm2": ("SmolLM2-135M", 1.03),
}
NOT_FOR = {"mlp": {"patch", "generate"}}
NOT_QUICK = {"gpt2 768": {"generate"}, "smollm2": set(CASES)}
FIRST_THIRD = 0.45
"""Of a whole forward: 4 of 12 layers, embeddings, and what tracing costs."""
NOISE = 0.02
"""How far two medians of the same thing lie apart on a machine that others use, too (see the figures of hooks to hooks)."""


class Worker:
    """A process that measures one library."""

    def __init__(self, python: Path | str, library: str, smollm2: Path) -> None:
        command = [str(python), str(HERE / "tracing_worker.py"), library, str(smollm2)]
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=one_thread
        )
        self.version = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=30)

    def ready(self) -> None:
        self.version = self._answer()["version"]

    def measure(self, model: str, case: str, repeat: int) -> dict[str, Any]:
        self._process.stdin.write(json.dumps({"model": model, "case": case, "repeat": repeat}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args} ended with {self._process.wait()}")
        return json.loads(line)


@dataclass
class Row:
    """What was measured of one case on one model, by library: seconds by hooks and by tracing, or why there are none."""

    hooks: dict[str, list[float]] = field(default_factory=dict)
    traced: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def note(self, library: str, answer: dict[str, Any]) -> None:
        self.hooks.setdefault(library, []).append(answer["hooks"])
        self.traced.setdefault(library, []).append(answer["traced"])

    def ratio(self, library: str) -> float:
        pairs = zip(self.traced[library], self.hooks[library], strict=True)
        return median(traced / hooks for traced, hooks in pairs)


def nnsight_python() -> Path:
    """The Python of the environment with nnsight, made now if it is missing."""
    python = NNSIGHT / "bin" / "python"
    if not (NNSIGHT / "ready").exists():
        venv.create(NNSIGHT, with_pip=False, clear=True)
        paths = {"base": NNSIGHT, "platbase": NNSIGHT}
        (Path(sysconfig.get_path("purelib", vars=paths)) / "parent.pth").write_text(sysconfig.get_path("purelib"))
        subprocess.run([python, "-m", "pip", "install", "--quiet", "nnsight"], check=True)
        (NNSIGHT / "ready").touch()
    return python


def interleaved(workers: dict[str, Worker], model: str, case: str, seconds: float) -> Row:
    """Rounds of all workers in turn, for about `seconds`, at least two."""
    row, able, a_round = Row(), dict(workers), 0.0
    for library, worker in workers.items():
        first = worker.measure(model, case, 1)
        if "error" in first:
            row.errors[library] = first["error"]
            del able[library]
        a_round += first.get("hooks", 0.0) + first.get("traced", 0.0)
    repeat = max(1, round(0.02 * len(able) / a_round)) if able else 1
    end, rounds = monotonic() + seconds, 0
    while able and (monotonic() < end or rounds < 2):
        for library, worker in sorted(able.items(), reverse=rounds % 2 == 1):
            row.note(library, worker.measure(model, case, repeat))
        rounds += 1
    return row


def figures(model: str, case: str, row: Row, newest: str) -> Iterator[Figure]:
    name, goal = MODELS[model]
    if "ours" in row.errors:
        yield Figure(f"{name}: {CASES[case]}", math.nan, 0, "<=", row.errors["ours"])
        return
    if case == "untraced":
        yield Figure(
            f"{name}: {CASES[case]}",
            row.ratio("ours"),
            1 + NOISE,
            "<=",
            "the unwrapped copy; no attribute or hook differs",
        )
        return
    if case == "save_third":
        goal = FIRST_THIRD if goal else None
    against = f"hooks, {1e3 * median(row.hooks['ours']):.3g} ms"
    yield Figure(f"{name}: {CASES[case]}", row.ratio("ours"), goal, "<=", against)
    if case == "empty":
        yield Figure(f"{name}: {CASES[case]} [ms]", 1e3 * median(row.traced["ours"]), None, "<=", "")
    if "nnsight" not in row.errors:
        its = row.ratio("nnsight")
        relative = row.ratio("ours") / its
        yield Figure("  to nnsight", relative, 1 + NOISE, "<=", f"nnsight {newest}: {its:.3g} of hooks")


def measure(quick: bool) -> Iterator[Figure]:
    folder = prepare(default_folder())
    with ExitStack() as stack:
        workers = {
            library: stack.enter_context(Worker(python, library, folder))
            for library, python in {"ours": sys.executable, "nnsight": nnsight_python()}.items()
        }
        for worker in workers.values():
            worker.ready()
        hooks = []
        for model, case in product(MODELS, CASES):
            if case in NOT_FOR.get(model, ()) or (quick and case in NOT_QUICK.get(model, ())):
                continue
            row = interleaved(workers, model, case, 0.4 if quick else 8)
            yield from figures(model, case, row, workers["nnsight"].version)
            if len(row.hooks) == len(workers):
                hooks.append(median(row.hooks["ours"]) / median(row.hooks["nnsight"]))
        yield Figure("hooks to hooks of the other process", median(hooks), None, "<=", "what is noise")


if __name__ == "__main__":
    main(measure, __doc__ or "")
