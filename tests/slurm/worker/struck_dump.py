"""A program: dumps from Python, each by attempts that SIGKILL ends at random steps, until one comes through.

    python -m tests.slurm.worker.struck_dump MODEL FOLDER SEED

Below FOLDER each format's dataset is then there twice: in ``undisturbed``, and in ``killed``. It prints how many attempts
were killed. Attempts are forks of this process, which has the model and has never run it.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from nnsight_hpc import LanguageModel
from nnsight_hpc.slurm.worker import dump as dump_module
from tests.models_for_tests import WORDS
from tests.slurm.worker.struck import at_each_step

if TYPE_CHECKING:
    from collections.abc import Callable

KILLS = 6


def dump(model: LanguageModel, form: str, source: random.Random) -> None:
    """Rows of tokens and of documents, in five slices."""
    texts = [" ".join(source.choices(WORDS, k=source.randint(0, 60))) for _ in range(40)]
    with model.dump(texts, name="set", format=form, batch_tokens=128) as d:
        hidden, mask = model.model.layers[1].output, d.mask[..., None]
        d.write("hidden", hidden)
        d.write("mean", (hidden * mask).sum(1) / mask.sum(1))


def attempt(work: Callable[[], None], folder: Path, kill_at: int | None = None) -> int:
    """Run `work` in a child with `folder` as its working folder; the steps that it took, or 0 where it was killed at one."""
    receiver, sender = os.pipe()
    child = os.fork()
    if not child:
        _run(work, folder, kill_at, sender)
    os.close(sender)
    with os.fdopen(receiver) as told:
        steps = told.read()
    _, status = os.waitpid(child, 0)
    if not steps and os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
        raise SystemExit("an attempt failed")
    return int(steps or 0)


def _run(work: Callable[[], None], folder: Path, kill_at: int | None, sender: int) -> None:
    """What the child does; it does not return."""
    taken, lock = 0, threading.Lock()

    def step() -> None:
        nonlocal taken
        with lock:
            taken += 1
            if taken == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)
        at_each_step(str(folder), step)
        work()
        os.write(sender, str(taken).encode())
    except BaseException:  # noqa: BLE001 - a fork must not go on with what its parent does
        traceback.print_exc()
    os._exit(0)


def main() -> None:
    model, folder, seed = LanguageModel(sys.argv[1], dispatch=True), Path(sys.argv[2]), int(sys.argv[3])
    _ = model.tokenizer
    dump_module.SLICE_ROWS = 256
    source, killed = random.Random(seed), 0
    for form in ("zarr", "hdf5"):
        corpus = source.random()

        def work(form: str = form, corpus: float = corpus) -> None:
            dump(model, form, random.Random(corpus))

        steps = attempt(work, folder / "undisturbed")
        for _ in range(KILLS):
            killed += not attempt(work, folder / "killed", source.randint(1, steps // 3))
        attempt(work, folder / "killed")
    print(killed)


if __name__ == "__main__":
    main()
