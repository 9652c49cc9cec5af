"""What a pool adds to a small trace: through the daemon's Unix socket, and over SSH to the test cluster (as root).

A random Llama of 8 million parameters, a prompt of 8 tokens, one saved value. The same trace runs in the researcher's
process, in turns with it, and HTTP echoes of the same body sizes, with aiohttp as the daemon has it: ``echo`` by the same
socket or by a channel of its own over the same kind of SSH connection; the ``echo of a worker`` goes on from there to another
process over TLS and comes back, as a request does; the ``durable`` one has each step on the disk before the next, too. The
ratios are of medians: what is added to the trace, to the echo.
Then a client as Petals has it (`latency_petals.py`) beside ours, through a proxy that adds 20 ms to each round trip.
``--quick``: fewer rounds, and nothing that needs the cluster.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from figures import Figure, main
from latency_ask import Asked
from latency_echo import LEASE
from throughput import served

sys.path.insert(0, str(Path(__file__).parents[1]))

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.cluster import Cluster

HERE = Path(__file__).parent
WIDTH, LAYERS, VOCABULARY = 256, 8, 2000
ROUNDS, QUICK_ROUNDS = 300, 60
LIMIT, GOOD = 3.0, 1.5
"""Times the echo through the same chain: what has to be reached, and what would be good."""
_ECHOES = {"echo": "echo", "chain": "echo of a worker", "stored": "durable echo of a worker"}
_TIMEOUT = 400
_PATIENCE = 60.0


def measure(quick: bool) -> Iterator[Figure]:
    rounds = QUICK_ROUNDS if quick else ROUNDS
    yield from _figures("socket", _through_the_socket(rounds))
    if not quick:
        over_ssh, petals = _on_the_cluster(rounds)
        yield from _figures("SSH", over_ssh)
        yield from petals


def _through_the_socket(rounds: int) -> list[Asked]:
    with tempfile.TemporaryDirectory(prefix="nnh-", dir="/tmp") as made:
        folder = Path(made)
        model = save_model(folder / "model")
        with served(folder, "tiny", model), _echoes(folder / "echo", _started_here):
            command = [sys.executable, HERE / "latency_ask.py", model, "tiny", str(rounds), folder / "echo"]
            own = {"NNSIGHT_HPC_HOME": str(folder / "home"), "XDG_RUNTIME_DIR": str(folder), "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, env=os.environ | own, check=True, stdout=subprocess.PIPE, timeout=_TIMEOUT)
    return _read(done.stdout)


def _on_the_cluster(rounds: int) -> tuple[list[Asked], list[Figure]]:
    from latency_petals import compare  # noqa: PLC0415 - only where there is a cluster

    from tests.cluster import Cluster  # noqa: PLC0415

    with Cluster.up(readable=[HERE]) as cluster:
        laptop = Laptop(cluster)
        laptop.add_profile("uni", "--default")
        model = save_model(cluster.shared / "model")
        laptop.nnsight(
            "up", "tiny", "--model", model, "--mem", "3000M", "--setup", "export OMP_NUM_THREADS=1", "--wait"
        )
        folder = cluster.scratch / "echo"
        try:
            with _echoes(folder, lambda *command: cluster.popen("login", command)):
                done = laptop.run(HERE / "latency_ask.py", model, "tiny", str(rounds), folder, "uni")
            return _read(done), compare(cluster, laptop, model)
        finally:
            laptop.nnsight("daemon", "stop", "--workers")
            cluster.cancel_all_jobs()


class Laptop:
    """The researcher's machine, which reaches the cluster by SSH only."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster, self._environment = cluster, {"HOME": str(cluster.laptop_home), "OMP_NUM_THREADS": "1"}

    def run(self, *arguments: str | Path) -> str:
        """What a Python program prints."""
        command = [sys.executable, *map(str, arguments)]
        home = self._cluster.laptop_home
        return self._cluster.run("laptop", command, env=self._environment, cwd=home, timeout=_TIMEOUT).stdout

    def nnsight(self, *arguments: str | Path) -> str:
        return self.run("-m", "nnsight_hpc.client", *arguments)

    def add_profile(self, name: str, *options: str, address: str = "", known_hosts: Path | None = None) -> None:
        keys = (
            "--identity-file",
            self._cluster.key("alice"),
            "--known-hosts",
            known_hosts or self._cluster.known_hosts,
        )
        self.nnsight("cluster", "add", name, f"alice@{address or self._cluster.address('login')}", *keys, *options)


@contextmanager
def _echoes(folder: Path, start: Callable[..., subprocess.Popen[Any]]) -> Iterator[None]:
    """An echo and its worker, each in a process of its own."""
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    program = str(HERE / "latency_echo.py")
    with ExitStack() as stack:
        for what in ("serve", "work"):
            process = start(sys.executable, program, what, str(folder))
            stack.callback(process.wait)
            stack.callback(process.kill)
            end = time.monotonic() + _PATIENCE
            while not (folder / LEASE).exists():
                if process.poll() is not None or time.monotonic() > end:
                    raise SystemExit("the echo did not start")
                time.sleep(0.05)
        yield


def _started_here(*command: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command)


def save_model(folder: Path) -> Path:
    """A random Llama in float32, for all to read."""
    import torch  # noqa: PLC0415 - only once the arguments are well
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)
    return folder


def _read(said: bytes | str) -> list[Asked]:
    return [Asked(**one) for one in json.loads(said.splitlines()[-1])]


class _Spread(NamedTuple):
    """Of a list of seconds, in milliseconds."""

    median: float
    p99: float

    @classmethod
    def of(cls, seconds: list[float]) -> _Spread:
        return cls(1e3 * median(seconds), 1e3 * sorted(seconds)[int(0.99 * len(seconds))])


def _figures(chain: str, rounds: list[Asked]) -> Iterator[Figure]:
    here = median(one.here for one in rounds)
    added = _Spread.of([one.remote - here for one in rounds])
    yield Figure(f"{chain}: the trace in process [ms]", 1e3 * here, None, "<=", "")
    yield Figure(f"{chain}: added by the pool, median [ms]", added.median, None, "<=", "the trace in process")
    yield Figure(f"{chain}: added by the pool, p99 [ms]", added.p99, None, "<=", "the trace in process")
    for stage in rounds[0].stages:
        of_all = median(one.stages[stage] for one in rounds)
        yield Figure(f"{chain}: of the whole, {stage} [ms]", 1e3 * of_all, None, "<=", "")
    for name, words in _ECHOES.items():
        echo = _Spread.of([getattr(one, name) for one in rounds])
        yield Figure(f"{chain}: {words}, median [ms]", echo.median, None, "<=", "")
        yield Figure(f"{chain}: {words}, p99 [ms]", echo.p99, None, "<=", "")
        yield Figure(f"{chain}: added / {words}", added.median / echo.median, LIMIT, "<=", f"it; {GOOD:g} is good")
    yield Figure(f"{chain}: calls of the daemon for a trace", max(one.calls for one in rounds), 1, "<=", "")


if __name__ == "__main__":
    main(measure, __doc__ or "")
