"""An account of this machine that tests have for themselves, and of which no process is left when they are done."""

from __future__ import annotations

import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

_PATIENCE = 120.0


@contextmanager
def local_account(**environment: str) -> Iterator[Path]:
    """Its folder (a short path: it holds a socket), which the environment names; the block ends what it has started."""
    with tempfile.TemporaryDirectory(prefix="r-") as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        for variable in ("NNSIGHT_HPC_CLUSTER", "NNSIGHT_HPC_SCRATCH"):
            patch.delenv(variable, raising=False)
        (folder / "run").mkdir(mode=0o700)
        patch.setenv("XDG_RUNTIME_DIR", f"{folder}/run")
        patch.setenv("XDG_CACHE_HOME", f"{folder}/cache")
        patch.setenv("NNSIGHT_HPC_HOME", f"{folder}/state")
        patch.setenv("NNSIGHT_HPC_CONFIG", f"{folder}/config.toml")
        for variable, value in environment.items():
            patch.setenv(variable, value)
        yield folder
        assert outlasting(folder) == []


def outlasting(folder: Path, program: str = "") -> list[str]:
    """The commands of those at work in `folder` that do not end in a while; only of one program where it is named.

    A job's end is known as soon as its worker has told it; the script that ran it writes there a little longer.
    """
    end = time.monotonic() + _PATIENCE
    while (left := [one for one in at_work_in(folder) if not program or program in one.info["cmdline"]]) and (
        time.monotonic() < end
    ):
        psutil.wait_procs(left, timeout=1)
    return [" ".join(process.info["cmdline"]) for process in left]


def at_work_in(folder: Path) -> list[psutil.Process]:
    """The processes that work in a folder, or whose command names it: a job's script, and what that runs."""
    return [
        process
        for process in psutil.process_iter(["cmdline", "cwd"])
        if any(str(folder) in place for place in (process.info["cwd"] or "", *(process.info["cmdline"] or ())))
    ]
