"""The demonstration: the main job on this machine, with the very commands that a researcher would type.

Each step is a command of its own, printed before it runs. Daemon, worker and results live in one folder, apart from the
user's own daemon; whatever happens, also at Ctrl-C, the daemon and its worker are stopped at the end.
"""

from __future__ import annotations

import inspect
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, TextIO

import platformdirs

from nnsight_hpc.client.config import CLUSTER_VARIABLE, CONFIG_VARIABLE, LOCAL
from nnsight_hpc.wire.errors import Conflict, HpcError
from nnsight_hpc.wire.files import write_atomically
from nnsight_hpc.wire.places import HOME_VARIABLE, SCRATCH_VARIABLE, SITE_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DOCUMENTS = 320
CONTEXT = 64
CAPTURES = ("model.layers.9.output", "model.layers.19.output", "model.layers.29.output")
DATASET = "docstrings"
_MARK = "demo.json"
_STOP_SECONDS = 150
"""More than `daemon stop --workers` takes at most."""


def run_demo(
    folder: Path, *, keep: bool = False, documents: int = DOCUMENTS, narration: TextIO | None = None
) -> dict[str, Any]:
    """Run the demonstration with its results in `folder`, dumping so many documents; what it did, and in how many seconds.

    What is shown on the way, the steps' own output too, goes to `narration` (stdout).

    Raises
    ------
    Conflict
        The folder exists and was not made by a demonstration.
    HpcError
        A step failed; it has said why.
    """
    shown = _Demo(_emptied(folder.absolute()), narration or sys.stdout, keep=keep, documents=documents)
    shown.run()
    return {"folder": str(folder.absolute()), "documents": documents, "seconds": shown.seconds}


def _emptied(folder: Path) -> Path:
    if folder.exists() and any(folder.iterdir()):
        if not (folder / _MARK).exists():
            raise Conflict(
                f"{folder} exists", why="it was not made by the demonstration", next="give another --out FOLDER"
            )
        import shutil  # noqa: PLC0415 - only for a second run

        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / _MARK, b"{}")
    return folder


class _Demo:
    """The steps, each timed; `seconds` is what `demo.json` holds in the end."""

    def __init__(self, folder: Path, narration: TextIO, *, keep: bool, documents: int) -> None:
        self._folder, self._narration, self._keep, self._documents = folder, narration, keep, documents
        self._model = f"{platformdirs.user_cache_dir('nnsight-hpc', appauthor=False)}/models/SmolLM2-135M-Instruct"
        state = {HOME_VARIABLE: str(folder / "state"), SCRATCH_VARIABLE: str(folder / "scratch")}
        nothing = dict.fromkeys((CONFIG_VARIABLE, SITE_VARIABLE), os.devnull)  # no [pool.smol] but ours
        self._environment = {**os.environ, **state, **nothing, CLUSTER_VARIABLE: LOCAL}
        self.seconds: dict[str, float] = {}

    def run(self) -> None:
        with self._stopped_at_the_end():
            self._step(
                "prepare the model", "Prepare SmolLM2-135M (once: about 30 s, most of it reading the vocabulary)"
            )
            self._python("nnsight_hpc.models.smollm2", "--to", self._model)
            self._step("start the pool", "Start the daemon and a pool of one worker, and wait until it is READY")
            self._command("up", "smol", "--model", self._model, "--wait")
            self._step("first experiment", "Run the first experiment on the pool")
            self._python(
                "nnsight_hpc.examples.first_experiment",
                "--model",
                self._model,
                "--pool",
                "smol",
                "--out",
                str(self._folder),
            )
            self._step("dump", f"Dump the residual stream of three layers for {self._documents} documents")
            self._command("dump", "smol", str(self._corpus()), "--name", DATASET, *_CAPTURE_OPTIONS)
            self._step("fetch", "Fetch the dataset, with its checksums verified")
            self._command("fetch", DATASET, "--to", str(self._folder))
            self._step("read", "Read shuffled batches from it")
            self._python("nnsight_hpc.examples.read_dataset", str(self._folder / f"{DATASET}.zarr"))
        self._say_where_everything_lies()

    def _corpus(self) -> Path:
        """Docstrings of Python's standard library: real English on every machine, nothing to download."""
        lines = [json.dumps({"id": name, "text": text}) for name, text in _docstrings(self._documents)]
        path = self._folder / "docstrings.jsonl"
        write_atomically(path, "\n".join(lines).encode(), mode=0o644)
        return path

    def _step(self, name: str, title: str) -> None:
        self._end_step()
        self._current, self._began = name, time.perf_counter()
        self._say(f"\n=== {title}")

    def _say(self, text: str) -> None:
        print(text, file=self._narration, flush=True)

    def _end_step(self) -> None:
        if self._current:
            self.seconds[self._current] = time.perf_counter() - self._began
            self._current = ""

    _current = ""
    _began = 0.0

    def _command(self, *arguments: str) -> None:
        self._run([sys.executable, "-m", "nnsight_hpc.client", *arguments], shown=["nnsight-hpc", *arguments])

    def _python(self, module: str, *arguments: str) -> None:
        self._run([sys.executable, "-m", module, *arguments], shown=["python", "-m", module, *arguments])

    def _run(self, command: list[str], *, shown: list[str]) -> None:
        self._say(f"$ {shlex.join(shown)}")
        step = subprocess.Popen(command, env=self._environment, process_group=0, stdout=self._narration)
        if code := _wait(step):
            raise HpcError(
                f"the demonstration stopped: {shown[0]} {shown[1]} … ended with exit code {code}",
                where=str(self._folder),
                why="its own message stands above",
            )

    @contextmanager
    def _stopped_at_the_end(self) -> Iterator[None]:
        """Whatever happens in the block, the daemon and its worker end. Further Ctrl-C do not stop the stopping."""
        previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            yield
            self._step("stop", "Stop the daemon and its worker")
        finally:
            interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
            if not self._keep:
                self._stop()
            signal.signal(signal.SIGINT, interrupt)
            signal.signal(signal.SIGTERM, previous)
        self._end_step()

    def _stop(self) -> None:
        command = [sys.executable, "-m", "nnsight_hpc.client", "daemon", "stop", "--workers"]
        subprocess.run(
            command,
            check=False,
            env=self._environment,
            timeout=_STOP_SECONDS,
            capture_output=True,
            start_new_session=True,
        )

    def _say_where_everything_lies(self) -> None:
        total = sum(self.seconds.values())
        write_atomically(self._folder / _MARK, json.dumps({"seconds": self.seconds}).encode(), mode=0o644)
        stop = f"{HOME_VARIABLE}={self._environment[HOME_VARIABLE]} nnsight-hpc daemon stop --workers"
        running = f"Daemon and worker still run; to stop them:\n{stop}\n" if self._keep else "Nothing runs any more. "
        self._say(f"\n=== Done in {total:.0f} s. {running}Everything lies in {self._folder}:")
        for name, what in (
            ("activation_patching.png", "the heat map"),
            (f"{DATASET}.zarr", "the fetched dataset"),
            ("docstrings.jsonl", "the corpus"),
            ("scratch", "the dataset as the worker wrote it"),
            ("state", "logs of daemon and worker, requests"),
        ):
            self._say(f"  {name:<26}{what}")
        self._say(f"  {self._model}: the model, for further runs")


def _wait(step: subprocess.Popen[bytes]) -> int:
    """The exit code of a step. Ctrl-C reaches only us (the step has a process group of its own), and we end the step."""
    try:
        return step.wait()
    except KeyboardInterrupt:
        step.terminate()
        step.wait()
        raise


_CAPTURE_OPTIONS = (
    *(part for capture in CAPTURES for part in ("--capture", capture)),
    *("--dtype", "bfloat16", "--context", str(CONTEXT)),
)


def _docstrings(count: int) -> list[tuple[str, str]]:
    """The first `count` docstrings of at least 200 characters of the standard library's plain modules, by name."""
    found: dict[str, str] = {}
    for name in sorted(sys.stdlib_module_names - _NOT_TO_IMPORT):
        if name.startswith("_") or len(found) >= count:
            continue
        try:
            module = import_module(name)
        except ImportError:  # a module of another platform
            continue
        for member in sorted(vars(module)):
            text = inspect.getdoc(getattr(module, member))
            if text and len(text) >= 200 and text not in found.values():
                found[f"{name}.{member}"] = text
    return list(found.items())[:count]


_NOT_TO_IMPORT = frozenset({"antigravity", "this", "idlelib", "turtle", "turtledemo", "tkinter", "test", "lib2to3"})
"""Modules that do something visible, or need a screen, when they are imported."""
