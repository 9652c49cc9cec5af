"""A client as Petals has it, beside ours, through the same SSH connection and a proxy that adds 20 ms to each round trip.

Petals (https://arxiv.org/abs/2209.01188) keeps a model's blocks on servers; its client holds the embeddings and the head, and
ships hidden states. So who reads or changes a block's output does it in the client: hidden states come back from there, and the
changed ones go on to the blocks behind it, at each token. This peer does that and nothing else: one server with all blocks and
the caches of attention, hidden states as raw bytes, no relay, no compression, one connection that stays open.

::

    latency_petals.py serve MODEL SOCKET             the server
    latency_petals.py relay SOCKET                   stdio to it
    latency_petals.py ask MODEL SOCKET CLUSTER       both programs, in turns; prints JSON
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import torch
from figures import Figure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from latency import Laptop

    from tests.cluster import Cluster

DELAY_MS, PORT, SSH_PORT = 20, 2299, 22
ROUNDS, TOKENS, AT = 15, 20, 4
"""How often each is measured, the tokens of a generation, and the block whose output is read or changed."""
STRENGTH = 0.5
IDS = torch.arange(8)[None]


def compare(cluster: Cluster, laptop: Laptop, model: Path) -> list[Figure]:
    """Both on the test cluster; `laptop` has a profile already, and the pool ``tiny`` serves `model`."""
    path = cluster.scratch / "petals.sock"
    address = cluster.address("login")
    delay = [
        sys.executable,
        Path(__file__).with_name("latency_delay.py"),
        str(PORT),
        address,
        str(SSH_PORT),
        str(DELAY_MS),
    ]
    known_hosts = cluster.laptop_home / "far_hosts"
    known_hosts.write_text(f"[127.0.0.1]:{PORT} {cluster.host_key('login')}\n")
    laptop.add_profile("far", "--port", str(PORT), address="127.0.0.1", known_hosts=known_hosts)
    serve = [sys.executable, __file__, "serve", model, path]
    with _running(cluster, "login", serve), _running(cluster, "laptop", delay):
        _until(path.exists)
        found: dict[str, dict[str, list[float]]] = json.loads(
            laptop.run(__file__, "ask", model, path, "far").splitlines()[-1]
        )
    return [figure for task, times in found.items() for figure in _figures(task, times)]


def _figures(task: str, times: dict[str, list[float]]) -> Iterator[Figure]:
    ours, theirs = (1e3 * median(times[who]) for who in ("ours", "theirs"))
    yield Figure(f"20 ms away: {task}, ours [ms]", ours, None, "<=", "")
    yield Figure(f"20 ms away: {task}, hidden states shipped [ms]", theirs, None, "<=", "")
    yield Figure(
        f"20 ms away: {task}, shipped / ours", theirs / ours, 1.0 if task == GENERATION else None, ">=", "ours"
    )


READING, GENERATION = "a block's output", f"{TOKENS} tokens with an intervention"


@contextmanager
def _running(cluster: Cluster, host: str, command: list[Any]) -> Iterator[None]:
    process = cluster.popen(host, [str(part) for part in command], env={"OMP_NUM_THREADS": "1"})
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _until(reached: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not reached():
        if time.monotonic() > end:
            raise SystemExit("the server of blocks did not start")
        time.sleep(0.05)


# -- the server --------------------------------------------------------------------------------------------------------


class Blocks:
    """All blocks of a model, and a cache of attention for each session."""

    def __init__(self, model: Any) -> None:
        self._model, self._caches = model.model, dict[str, Any]()

    @torch.no_grad()
    def run(self, hidden: torch.Tensor, first: int, end: int, session: str, past: int) -> torch.Tensor:
        """Through the blocks from `first` to before `end`, after `past` tokens of the session."""
        from transformers import DynamicCache  # noqa: PLC0415 - the server's only

        cache = self._caches.setdefault(session, DynamicCache())
        positions = torch.arange(past, past + hidden.shape[1])[None]
        embeddings = self._model.rotary_emb(hidden, positions)
        for layer in self._model.layers[first:end]:
            hidden = layer(
                hidden, position_embeddings=embeddings, position_ids=positions, past_key_values=cache, use_cache=True
            )
        return hidden


async def _serve(folder: str, path: str) -> None:
    from aiohttp import web  # noqa: PLC0415

    blocks = Blocks(_load(folder))

    async def run(request: web.Request) -> web.Response:
        query = request.query
        hidden = torch.frombuffer(bytearray(await request.read()), dtype=torch.float32)
        hidden = hidden.reshape(1, -1, int(query["width"]))
        numbers = (int(query[name]) for name in ("first", "end"))
        out = blocks.run(hidden, *numbers, query["session"], int(query["past"]))
        return web.Response(body=out.numpy().tobytes())

    app = web.Application()
    app.add_routes([web.post("/run", run)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.UnixSite(runner, path).start()
    await asyncio.Event().wait()


def _load(folder: str) -> Any:
    from transformers import LlamaForCausalLM  # noqa: PLC0415 - those who only relay need none

    return LlamaForCausalLM.from_pretrained(folder).eval()


def _relay(path: str) -> None:
    from nnsight_hpc.client.bridge import relay  # noqa: PLC0415 - on the login node only

    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        relay(server)


# -- the two programs of a researcher ------------------------------------------------------------------------------------


class Shipping:
    """The client's part: embeddings, norm and head here, the blocks over there."""

    def __init__(self, model: Any, open_stream: Callable[[], socket.socket]) -> None:
        from nnsight_hpc.wire.http import HttpClient  # noqa: PLC0415

        self._model, self._http = model, HttpClient(open_stream, peer="the server of blocks")
        self._blocks = len(model.model.layers)

    @torch.no_grad()
    def read(self) -> torch.Tensor:
        """The output of block `AT`; the blocks behind it do not run."""
        return self._run(self._model.model.embed_tokens(IDS), 0, AT + 1, uuid4().hex, 0)

    @torch.no_grad()
    def generate(self) -> list[int]:
        """Greedily, with the output of block `AT` changed at each token."""
        session, tokens, past = uuid4().hex, IDS, 0
        made: list[int] = []
        for _ in range(TOKENS):
            hidden = self._run(self._model.model.embed_tokens(tokens), 0, AT + 1, session, past)
            hidden = self._run(hidden * STRENGTH, AT + 1, self._blocks, session, past)
            past += tokens.shape[1]
            logits = self._model.lm_head(self._model.model.norm(hidden[:, -1]))
            tokens = logits.argmax(-1, keepdim=True)
            made.append(int(tokens))
        return made

    def _run(self, hidden: torch.Tensor, first: int, end: int, session: str, past: int) -> torch.Tensor:
        path = f"/run?first={first}&end={end}&session={session}&past={past}&width={hidden.shape[-1]}"
        out = self._http.call("POST", path, hidden.contiguous().numpy().tobytes())
        return torch.frombuffer(bytearray(out), dtype=torch.float32).reshape(hidden.shape)


class Ours:
    """The same as traces: one request each."""

    def __init__(self, folder: str, cluster: str) -> None:
        from nnsight_hpc import LanguageModel  # noqa: PLC0415

        self._model, self._where = LanguageModel(folder), {"remote": True, "pool": "tiny", "cluster": cluster}

    def read(self) -> torch.Tensor:
        with self._model.trace(IDS, **self._where):
            hidden = self._model.model.layers[AT].output.save()
        return hidden  # noqa: RET504 - the block above is recorded, and nothing is returned there

    def generate(self) -> list[int]:
        with self._model.generate(IDS, max_new_tokens=TOKENS, do_sample=False, **self._where) as tracer:
            with tracer.all():
                block = self._model.model.layers[AT]
                block.output = block.output * STRENGTH
            made = tracer.result.save()
        return made[0, IDS.shape[1] :].tolist()


def _ask(folder: str, path: str, cluster: str) -> dict[str, dict[str, list[float]]]:
    from nnsight_hpc.client import config  # noqa: PLC0415
    from nnsight_hpc.client.transport import transport_for  # noqa: PLC0415

    profile = config.load().find(cluster)
    assert profile is not None

    def open_stream() -> socket.socket:
        ours, theirs = socket.socketpair()
        transport_for(cluster, profile).attach(theirs, f"{sys.executable} {__file__} relay {path}")
        return ours

    theirs, ours = Shipping(_load(folder), open_stream), Ours(folder, cluster)
    torch.testing.assert_close(ours.read(), theirs.read())
    assert ours.generate() == theirs.generate(), "both make the same tokens"
    found: dict[str, dict[str, list[float]]] = {}
    for task, name in ((READING, "read"), (GENERATION, "generate")):
        times: dict[str, list[float]] = {"ours": [], "theirs": []}
        for _ in range(ROUNDS):
            for who, program in (("ours", ours), ("theirs", theirs)):
                begun = time.monotonic()
                getattr(program, name)()
                times[who].append(time.monotonic() - begun)
        found[task] = times
    return found


def main() -> None:
    what, *arguments = sys.argv[1:]
    if what == "serve":
        asyncio.run(_serve(*arguments))
    elif what == "relay":
        _relay(*arguments)
    else:
        print(json.dumps(_ask(*arguments)))


if __name__ == "__main__":
    main()
