"""Time to the first answer: a resident pool beside a fresh Slurm job that loads the model, for random Llamas of several sizes.

Both on the test cluster (as root: real Slurm, SSH and daemon on this machine, one core for each), with the same program
(`residency_ask.py`): a researcher's on the laptop, and the body of a job that is submitted for one question. The cluster is
empty, so a job never waits for others, which it would elsewhere; the weights are not in memory when a job begins, as on a
node that has done other things. The laptop is logged in (``nnsight-hpc connect``). The figure is docs/images/residency.png;
``--quick`` measures two small sizes and draws none.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from figures import Figure, main

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.cluster import Cluster

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from subprocess import CompletedProcess

SIZES = {"11 MB": (256, 2), "104 MB": (768, 3), "1 GB": (1280, 12), "3.5 GB": (2048, 16)}
"""The bytes of the float32 weights: width and number of layers."""
QUICK = ("11 MB", "104 MB")
IMAGE = Path(__file__).parents[1] / "docs" / "images" / "residency.png"
SET_UP, FASTER = 2.0, 2.0
"""Goals: seconds of set-up with a resident pool, at any size; how many times a job takes what an open notebook does."""
_ASK = Path(__file__).with_name("residency_ask.py")
_THREADS = "export OMP_NUM_THREADS=1"
_MEMORY = "7000M"


class Times(NamedTuple):
    """Seconds to the first answer: since the program was started, since it had the model's tree of modules; and to the next."""

    program: float
    notebook: float
    again: float


@dataclass(frozen=True)
class Size:
    """What one size of model took."""

    name: str
    bytes: int
    job: Times
    pool: Times


def measure(quick: bool) -> Iterator[Figure]:
    with Cluster.up() as cluster:
        nnsight = partial(_on_laptop, cluster, "-m", "nnsight_hpc.client")
        _add_profile(cluster, nnsight)
        nnsight("connect", "--background")
        try:
            sizes = [_measure(cluster, nnsight, name, runs=1 if quick else 3) for name in (QUICK if quick else SIZES)]
        finally:
            nnsight("daemon", "stop", "--workers", check=False)
            nnsight("disconnect", check=False)
            cluster.cancel_all_jobs()
    if not quick:
        _draw(sizes)
    return _figures(sizes)


def _figures(sizes: list[Size]) -> Iterator[Figure]:
    for size in sizes:
        against = f"{size.bytes / 1e6:.0f} MB"
        yield Figure(f"{size.name}: a fresh job [s]", size.job.program, None, "<=", against)
        yield Figure(f"{size.name}: of these, load and answer [s]", size.job.notebook, None, "<=", against)
        yield Figure(f"{size.name}: a new program, resident pool [s]", size.pool.program, None, "<=", against)
        yield Figure(f"{size.name}: an open notebook, resident pool [s]", size.pool.notebook, None, "<=", against)
        yield Figure(f"{size.name}: the next answer of the pool [s]", size.pool.again, None, "<=", against)
        ratio = size.job.program / size.pool.notebook
        yield Figure(f"{size.name}: a job / an open notebook", ratio, FASTER, ">=", "resident pool")
    set_up = max(size.pool.notebook - size.pool.again for size in sizes)
    yield Figure("longest set-up with a resident pool [s]", set_up, SET_UP, "<=", "all sizes")
    growth = (sizes[-1].job.notebook - sizes[-1].job.again) / (sizes[0].job.notebook - sizes[0].job.again)
    yield Figure("load in a fresh job, largest / smallest", growth, None, ">=", "all sizes")


def _on_laptop(cluster: Cluster, *arguments: str, check: bool = True) -> CompletedProcess[str]:
    home = cluster.laptop_home
    environment = {"HOME": str(home), "OMP_NUM_THREADS": "1"}
    return cluster.run("laptop", [sys.executable, *arguments], env=environment, cwd=home, check=check, timeout=600)


def _add_profile(cluster: Cluster, nnsight: Callable[..., CompletedProcess[str]]) -> None:
    keys = ("--identity-file", str(cluster.key("alice")), "--known-hosts", str(cluster.known_hosts), "--default")
    nnsight("cluster", "add", "uni", f"alice@{cluster.address('login')}", *keys)


def _measure(cluster: Cluster, nnsight: Callable[..., CompletedProcess[str]], name: str, *, runs: int) -> Size:
    folder = cluster.shared / name.replace(" ", "-")
    size = _save(folder, *SIZES[name])
    try:
        job = [_ask_by_job(cluster, folder) for _ in range(runs)]
        options = ("--model", str(folder), "--mem", _MEMORY, "--time", "00:30:00", "--setup", _THREADS)
        pool = folder.name.replace(".", "-").lower()
        nnsight("up", pool, *options, "--wait")
        resident = [_times(time.time(), _on_laptop(cluster, str(_ASK), str(folder), pool)) for _ in range(runs)]
        nnsight("down", pool, "--wait")
    finally:
        shutil.rmtree(folder)
    print(f"{name}: job {job}, pool {resident}", file=sys.stderr)
    return Size(name, size, _median(job), _median(resident))


def _ask_by_job(cluster: Cluster, folder: Path) -> Times:
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as weights:
            os.posix_fadvise(weights.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    srun = ["srun", "--mpi=none", f"--mem={_MEMORY}", "--cpus-per-task=1", sys.executable, str(_ASK), str(folder)]
    begun = time.time()
    return _times(begun, cluster.run("login", srun, env={"OMP_NUM_THREADS": "1"}, timeout=600))


def _times(begun: float, done: CompletedProcess[str]) -> Times:
    said = json.loads(done.stdout.splitlines()[-1])
    first, *_ = answered = said["answered"]
    later = [after - before for before, after in itertools.pairwise(answered)]
    return Times(first - begun, first - said["open"], statistics.median(later))


def _median(times: list[Times]) -> Times:
    return Times(*map(statistics.median, zip(*times, strict=True)))


def _save(folder: Path, width: int, layers: int) -> int:
    """A random Llama in float32, on the disk; its size in bytes."""
    import torch  # noqa: PLC0415 - only once the arguments are well
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    config = LlamaConfig(
        vocab_size=2000,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    torch.set_num_threads(1)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="1GB")
    files = [*folder.glob("*.safetensors")]
    for file in files:
        file.chmod(0o644)
        with file.open("rb") as weights:
            os.fsync(weights.fileno())
    return sum(file.stat().st_size for file in files)


def _draw(sizes: list[Size]) -> None:
    from matplotlib import pyplot as plt  # noqa: PLC0415 - only where a figure is wanted

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    gigabytes = [size.bytes / 1e9 for size in sizes]
    lines = {
        "a fresh job that loads the model": [size.job.program for size in sizes],
        "of these, load and answer": [size.job.notebook for size in sizes],
        "resident pool, a new program": [size.pool.program for size in sizes],
        "resident pool, an open notebook": [size.pool.notebook for size in sizes],
        "resident pool, the next answer": [size.pool.again for size in sizes],
    }
    for (name, seconds), style in zip(lines.items(), ("o-", "o:", "s-", "D-", "^--"), strict=True):
        axes.plot(gigabytes, seconds, style, label=name)
    axes.set(xlabel="weights", ylabel="seconds to the answer", xscale="log", yscale="log")
    axes.set_xticks(gigabytes, [size.name for size in sizes])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(IMAGE, dpi=150)


if __name__ == "__main__":
    main(measure, __doc__ or "")
