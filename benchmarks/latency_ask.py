"""``latency_ask.py MODEL POOL ROUNDS ECHO [CLUSTER]``: a researcher's program that asks for one value, again and again.

In each round the same trace runs in this process and on the pool, and bodies of the same sizes go to the echoes of
`latency_echo.py` in the folder ECHO: by its Unix socket, or with CLUSTER through a channel of its own over SSH, as the
traces'. Prints JSON: `Asked` of each round.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from latency_echo import SOCKET

from nnsight_hpc import LanguageModel
from nnsight_hpc.client import config
from nnsight_hpc.client.patience import PatientClient
from nnsight_hpc.client.transport import transport_for
from nnsight_hpc.wire.frames import unpack
from nnsight_hpc.wire.http import HttpClient
from nnsight_hpc.wire.messages import RequestLog, decode

if TYPE_CHECKING:
    from collections.abc import Callable

IDS = torch.arange(8)[None]
WARM = 20


@dataclass(frozen=True)
class Asked:
    """One round, in seconds. `stages` are those of the remote trace, in their order; `calls` how often it asked the daemon."""

    here: float
    remote: float
    echo: float
    chain: float
    stored: float
    calls: int
    stages: dict[str, float]


class _Calls:
    """What the client asks the daemon: when each call began and ended, and its answer."""

    def __init__(self) -> None:
        self.made: list[tuple[float, float, bytes, bytes]] = []
        plain = PatientClient.call

        def call(client: PatientClient, method: str, path: str, body: Any = None, **options: Any) -> bytes:
            begun = time.time()
            answer = plain(client, method, path, body, **options)
            self.made.append((begun, time.time(), body or b"", answer))
            return answer

        PatientClient.call = call  # type: ignore[method-assign]  # they are seen nowhere else


def main() -> None:
    path, pool, rounds, folder, *cluster = sys.argv[1:]
    model, calls = LanguageModel(path), _Calls()
    echo = HttpClient(_opener(Path(folder), *cluster), peer="the echo")

    def trace(*, remote: bool) -> tuple[float, float]:
        begun = time.time()
        with model.trace(IDS, remote=remote, pool=pool if remote else None):
            model.model.layers[0].output[0].mean().save()
        return begun, time.time()

    def asked() -> Asked:
        begun, ended = trace(remote=False)
        calls.made.clear()
        asked, answered = trace(remote=True)
        [first, *_] = made = list(calls.made)
        sizes = sum(len(sent) for _, _, sent, _ in made), sum(len(answer) for *_, answer in made)
        stages = _stages(asked, answered, first)
        echoes = (echoed(path, *sizes) for path in ("/echo", "/chain", "/stored"))
        return Asked(ended - begun, answered - asked, *echoes, len(made), stages)

    def echoed(path: str, sent: int, answer: int) -> float:
        begun = time.time()
        echo.call("POST", f"{path}?bytes={answer}", b"e" * sent)
        return time.time() - begun

    found = [asked() for _ in range(WARM + int(rounds))][WARM:]
    print(json.dumps([asdict(one) for one in found]))


def _stages(asked: float, answered: float, call: tuple[float, float, bytes, bytes]) -> dict[str, float]:
    """Where the time went, by the moments that the daemon wrote down; all clocks are this machine's."""
    begun, ended, _, answer = call
    times = decode(unpack(answer)[0], RequestLog).status.times
    return {
        "client": begun - asked + answered - ended,
        "there": times["RECEIVED"] - begun,
        "daemon": times["QUEUED"] - times["RECEIVED"],
        "lease": times["LEASED"] - times["QUEUED"],
        "worker": times["COMPLETED"] - times["LEASED"],
        "back": ended - times["COMPLETED"],
    }


def _opener(folder: Path, cluster: str | None = None) -> Callable[[], socket.socket]:
    if cluster is None:
        return lambda: _connected(folder / SOCKET)
    profile = config.load().find(cluster)
    assert profile is not None
    program = Path(__file__).with_name("latency_echo.py")
    command = f"{sys.executable} {program} relay {folder}"

    def attach() -> socket.socket:
        ours, theirs = socket.socketpair()
        transport_for(cluster, profile).attach(theirs, command)
        return ours

    return attach


def _connected(path: Path) -> socket.socket:
    stream = socket.socket(socket.AF_UNIX)
    stream.connect(str(path))
    return stream


if __name__ == "__main__":
    main()
