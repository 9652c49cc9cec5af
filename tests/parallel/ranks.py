"""Starts real MPI ranks once and asks them many things: starting takes seconds, a check milliseconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
DEGREES = (2, 3, 4)


def mostly(*degrees: int) -> list[object]:
    """All numbers of ranks as parameters of a test; on others than these it runs in `make test-long` alone."""
    return [ranks if ranks in degrees else pytest.param(ranks, marks=pytest.mark.long) for ranks in DEGREES]


def mpirun(
    ranks: int, program: list[str], *, scratch: Path, timeout: float = 120, **environment: str
) -> subprocess.Popen:
    """Start `program` (arguments of Python) on so many ranks; its output goes to ``scratch/output``."""
    command = ["mpirun", "--oversubscribe", "--allow-run-as-root", "--bind-to", "none", "-np", str(ranks)]
    command += ["--mca", "btl_vader_backing_directory", str(scratch)]  # what a killed rank leaves is removed with it
    own = {
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(scratch),
        "PYTHONFAULTHANDLER": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    with (scratch / "output").open("wb") as output:
        return subprocess.Popen(
            ["timeout", "--kill-after=5", str(timeout), *command, sys.executable, "-m", "mpi4py", *program],
            env=os.environ | own | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
        )


@cache
def answers(module: str, ranks: int, timeout: float = 250, **environment: str) -> dict[str, str]:
    """What each check of a module said on so many ranks: nothing, or on which ranks it failed and how."""
    with tempfile.TemporaryDirectory(prefix="nnh-mpi-") as folder:
        scratch = Path(folder)
        program = ["-m", "tests.parallel.rank", module, str(scratch / "answers")]
        process = mpirun(ranks, program, scratch=scratch, timeout=timeout, **environment)
        process.wait()
        written = scratch / "answers"
        found = [json.loads(line) for line in written.read_text().splitlines()] if written.exists() else []
        output = (scratch / "output").read_text(errors="replace")
    said = {name: "\n".join(f"rank {r}: {error}" for r, error in errors.items()) for name, errors in found}
    end = "" if process.returncode == 0 else f"exit code {process.returncode}:\n{output[-6000:]}"
    return {name: said.get(name, "was not reached, or never ended: see `the end`") for name in checks(module)} | {
        "the end": end
    }


def checks(module: str) -> dict[str, object]:
    """The checks of a module, by name, in their order."""
    names = vars(import_module(f"tests.parallel.{module}"))
    own = (n for n, value in names.items() if n.startswith("check_") and value.__module__.endswith(module))
    return {name: names[name] for name in own}
