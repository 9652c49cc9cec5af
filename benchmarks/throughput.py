"""Requests a second of one replica of SmolLM2-135M on this machine, for 1 to 64 clients at once against one at a time.

A daemon and a worker of their own on the CPU, the model on one core, and clients that speak to the daemon as `trace` does,
through its Unix socket, or each through an ssh of its own to an sshd of this machine; each sends its next request when it has
the last one's result. Requests save a layer's output for a prompt of random words, all of 12 tokens, or of 9 to 16 (which share
forwards only with their like). Recording is left out: it happens on the researcher's machine, and would take the worker's cores
here. The limit is what the forwards alone give: one prompt at a time against 16 in one, on one core; it is the machine's:
6.2 on one, 2.3 on another. Sizes take turns, and figures are medians over rounds. The figure is docs/images/throughput.png;
``--quick`` measures less and draws none.
"""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager
from itertools import chain, product
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch
from figures import Figure, main
from transformers import AutoModelForCausalLM

from nnsight_hpc.client.sending import request_path
from nnsight_hpc.client.session import bridge_command, open_stream
from nnsight_hpc.client.transport import transport_for
from nnsight_hpc.client.waiting import FIRST_POLL, check_completed, messages
from nnsight_hpc.execution.values import save_tensors
from nnsight_hpc.graph import capture_graph
from nnsight_hpc.models.smollm2 import default_folder, prepare
from nnsight_hpc.wire.errors import HpcError
from nnsight_hpc.wire.frames import pack, unpack
from nnsight_hpc.wire.http import HttpClient
from nnsight_hpc.wire.messages import LeaseRecord, ModelIdentity, RequestLog, decode
from nnsight_hpc.wire.names import new_request_id
from nnsight_hpc.wire.places import places_at
from nnsight_hpc.wire.pools import PoolSpec, PoolStatus

sys.path.insert(0, str(Path(__file__).parents[1]))

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

POOL = "smollm2"
IMAGE = Path(__file__).parents[1] / "docs" / "images" / "throughput.png"
CLIENTS = (1, 4, 16, 64)
LENGTHS = {"one length": (12, 12), "9 to 16 tokens": (9, 16)}
SSH = ", by SSH"
TOGETHER = 16
GOAL, OF_THE_LIMIT = 3.0, 0.85
"""Of 16 clients with prompts of one length: times one at a time, and the share of what the forwards alone give."""
WORDS = 49_152
SECONDS, ROUNDS = 8.0, 2
_EACH = 3
"""Requests of each client at least."""
_PATIENCE = 300.0

Rates = dict[tuple[str, int], float]
"""Requests a second by the lengths of the prompts and the number of clients."""


def measure(quick: bool) -> Iterator[Figure]:
    clients, rounds = (CLIENTS[:3], 1) if quick else (CLIENTS, ROUNDS)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nnh-", dir="/tmp")))
        open_socket = stack.enter_context(served(folder, POOL, prepare(default_folder())))
        ways = {"": open_socket}
        if not quick:
            ways[SSH] = stack.enter_context(_over_ssh(folder))
        lines = {
            way: [HttpClient(opener, peer="the daemon") for _ in range(clients[-1])] for way, opener in ways.items()
        }
        for https in lines.values():
            _rate(https, (9, 16), 1.0)  # the first of each kind takes longer, and so do connections
        series = [("one length", ""), ("9 to 16 tokens", ""), *(("one length", way) for way in ways if way)]
        taken: dict[tuple[str, int], list[float]] = {}
        limits, model = [], _bare_model()
        for _, (lengths, way), number in product(range(rounds), series, clients):
            if number == 1:
                limits.append(_limit(model))
            rate = _rate(lines[way][:number], LENGTHS[lengths], SECONDS / (1 + quick))
            taken.setdefault((lengths + way, number), []).append(rate)
        for http in chain.from_iterable(lines.values()):
            http.close()
    found, limit = {each: median(rates) for each, rates in taken.items()}, median(limits)
    if not quick:
        _draw(found, limit)
    for (name, number), rate in found.items():
        yield Figure(f"{name}, {number} clients [requests/s]", rate, None, ">=", "")
        if number > 1:
            goal = GOAL if (name, number) == ("one length", TOGETHER) else None
            yield Figure(f"{name}, {number} clients [times]", rate / found[name, 1], goal, ">=", "one at a time")
    alike = found["one length", TOGETHER] / found["one length", 1]
    yield Figure(f"forwards alone, {TOGETHER} prompts in one [times]", limit, None, ">=", "one prompt in each")
    yield Figure(f"one length, {TOGETHER} clients / limit", alike / limit, OF_THE_LIMIT, ">=", "the forwards alone")


def _bare_model() -> torch.nn.Module:
    """The model as the worker has it, without the head, which no request needs."""
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(prepare(default_folder())).eval().model


def _limit(model: torch.nn.Module) -> float:
    """How many times as many prompts a second the bare model takes when they come together."""

    def seconds(prompts: int) -> float:
        ids = torch.randint(0, WORDS, (prompts, LENGTHS["one length"][0]))
        begun = time.perf_counter()
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
        return time.perf_counter() - begun

    pairs = [(seconds(1), seconds(TOGETHER)) for _ in range(5)]
    alone, together = (median(each) for each in zip(*pairs, strict=True))
    return TOGETHER * alone / together


def _rate(clients: list[HttpClient], lengths: tuple[int, int], seconds: float) -> float:
    """Requests a second that these get answered, each some, until all have their last result."""
    begun = time.monotonic()
    answered = [0] * len(clients)

    def ask(number: int) -> None:
        drawn = random.Random(number)
        while answered[number] < _EACH or time.monotonic() < begun + seconds:
            _ask(clients[number], drawn.randint(*lengths))
            answered[number] += 1

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(clients))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(answered) / (time.monotonic() - begun)


def _ask(http: HttpClient, tokens: int) -> None:
    request = new_request_id()
    log, result = unpack(http.call("POST", request_path(request, POOL, wait=FIRST_POLL), _frame(tokens)))
    for one in messages(http, request, known=decode(log, RequestLog)):
        status = one.status
    check_completed(status)
    assert result or http.call("GET", f"/v1/requests/{request}/result")


def _frame(tokens: int) -> bytes:
    ids = torch.randint(0, WORDS, (1, tokens))
    graph = capture_graph({"hidden": "model.layers.29.output"}, ModelIdentity(id=str(default_folder())))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(tokens)[None]}
    return pack(graph.to_json().encode(), save_tensors(inputs))


@contextmanager
def served(folder: Path, pool: str, model: Path) -> Iterator[Callable[[], socket.socket]]:
    """A daemon with a ready pool of a model; what opens a socket to it."""
    places = places_at(folder / "home" / "embedded")
    own = {"NNSIGHT_HPC_HOME": str(folder / "home"), "XDG_RUNTIME_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    environment = os.environ | own  # the daemon and the clients need a core, too
    with (folder / "log").open("ab") as log:
        command = [sys.executable, "-m", "nnsight_hpc.daemon", "--executor", "embedded"]
        daemon = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def open_socket() -> socket.socket:
        stream = socket.socket(socket.AF_UNIX)
        stream.connect(decode(places.lease.read_bytes(), LeaseRecord).socket)
        return stream

    http = HttpClient(open_socket, peer="the daemon")
    try:
        _until(lambda: http.call("GET", "/v1/hello"))
        http.put(f"/v1/pools/{pool}", PoolSpec(name=pool, model=str(model)), PoolStatus)
        _until(lambda: http.get(f"/v1/pools/{pool}", PoolStatus).replicas[-1].state == "READY")
        yield open_socket
    finally:
        http.call("POST", "/v1/stop?workers=1", timeout=60)
        daemon.wait(60)


@contextmanager
def _over_ssh(folder: Path) -> Iterator[Callable[[], socket.socket]]:
    """What opens a stream to the daemon through a login of its own: ssh, a real sshd, a bridge."""
    from tests.client.sshd import Sshd  # noqa: PLC0415 - only where it is measured

    with Sshd(folder) as sshd:
        there = {"NNSIGHT_HPC_HOME": str(folder / "home"), "XDG_RUNTIME_DIR": str(folder)}
        profile = sshd.profile("openssh", environment=there)
        command = f"{bridge_command(profile)} --executor embedded"
        yield lambda: open_stream(transport_for("here", profile), command, peer="the daemon")


def _until(reached: Callable[[], object]) -> None:
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        try:
            if reached():
                return
        except (HpcError, OSError, IndexError):
            pass
        time.sleep(0.1)
    raise SystemExit("the daemon and its worker did not get ready")


def _draw(rates: Rates, limit: float) -> None:
    from matplotlib import pyplot as plt  # noqa: PLC0415 - only where a figure is wanted

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    series = dict.fromkeys(name for name, _ in rates)
    for name, style in zip(series, ("o-", "s--", "^:"), strict=True):
        axes.plot(CLIENTS, [rates[name, number] / rates[name, 1] for number in CLIENTS], style, label=name)
    axes.plot([TOGETHER], [limit], "x", color="black", label=f"the forwards alone, {TOGETHER} in one")
    axes.set(xlabel="clients at once", ylabel="requests a second, against one at a time", xscale="log")
    axes.set_xticks(CLIENTS, [*map(str, CLIENTS)])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(title="prompts")
    figure.savefig(IMAGE, dpi=150)


if __name__ == "__main__":
    main(measure, __doc__ or "")
