"""A pool on this machine with a real daemon and a real worker that holds a tiny Llama, and programs for it."""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from nnsight_hpc.client.backend import RemoteBackend
from nnsight_hpc.client.launch import wait_until_gone
from nnsight_hpc.client.session import connect
from nnsight_hpc.graph import Graph, Ref, TensorRef
from nnsight_hpc.graph.build import FORWARD, LOG, READS, SAVE, GraphBuilder
from nnsight_hpc.graph.nodes import Source
from nnsight_hpc.wire.messages import Hello, ModelIdentity
from nnsight_hpc.wire.pools import PoolSpec, PoolStatus
from nnsight_hpc.wire.states import ReplicaState

if TYPE_CHECKING:
    from collections.abc import Iterator

IDS = torch.tensor([[3, 4, 5, 6, 7]])
LINE = Source("script.py", 7, "x = …")
BUDGET = 32 << 20


@contextmanager
def serving(model: Path) -> Iterator[str]:
    """A pool of one worker that serves, on the profile `local` of an account of its own."""
    with tempfile.TemporaryDirectory(prefix="r-") as folder, pytest.MonkeyPatch.context() as patch:
        for name in ("NNSIGHT_HPC_CLUSTER", "NNSIGHT_HPC_SCRATCH"):
            patch.delenv(name, raising=False)
        (Path(folder) / "run").mkdir(mode=0o700)
        patch.setenv("OMP_NUM_THREADS", "1")  # the worker's; otherwise threads of all tests fight for the cores
        patch.setenv("XDG_RUNTIME_DIR", f"{folder}/run")
        patch.setenv("XDG_CACHE_HOME", f"{folder}/cache")
        patch.setenv("NNSIGHT_HPC_HOME", f"{folder}/state")
        patch.setenv("NNSIGHT_HPC_CONFIG", f"{folder}/config.toml")
        daemon = connect("local")
        spec = PoolSpec(name="tiny", model=str(model), request_memory=BUDGET)
        status = daemon.put("/v1/pools/tiny", spec, PoolStatus)
        while status.replicas[-1].state != ReplicaState.READY:
            assert not status.replicas[-1].state.ended, status.replicas[-1].reason
            path = f"/v1/pools/tiny?wait=5&seen={status.replicas[-1].state}"
            status = daemon.get(path, PoolStatus)
        yield "tiny"
        process = daemon.get("/v1/hello", Hello).pid
        daemon.call("POST", "/v1/stop?workers=1")
        daemon.close()
        assert wait_until_gone(process, 30)


class Program:
    """A graph in the making, at one line of a script."""

    def __init__(self) -> None:
        self.builder, self.saves = GraphBuilder(), dict[str, int]()

    def add(self, op: str, *args: Any, **more: Any) -> Ref:
        return Ref(self.builder.add(op, *args, source=LINE, **more))

    def forward(self) -> Ref:
        return Ref(self.builder.append(FORWARD, (), {"input_ids": TensorRef("ids"), "use_cache": False}, LINE))

    def hidden(self) -> Ref:
        return self.add(READS["output"], self.forward(), "model.layers.1")

    def save(self, name: str, value: Ref, **more: Any) -> None:
        self.saves[name] = self.add(SAVE, value, **more).id

    def graph(self) -> Graph:
        return self.builder.build(self.saves, ModelIdentity(id="tiny"))


def slow(forwards: int = 800) -> Program:
    """Says something, runs many forwards, and says something again."""
    program = Program()
    first = program.hidden()
    program.add(LOG, "begins", program.add("Tensor.mean", first))
    last = first
    for _ in range(forwards):
        last = program.add("operator.add", last, program.hidden())  # all of them are needed
    program.add(LOG, "ends", program.add("Tensor.mean", last))
    program.save("last", last)
    return program


def submit(program: Program, pool: str):
    return RemoteBackend(pool=pool).submit(program.graph(), {"ids": IDS}, None)


def run(program: Program, pool: str) -> dict[str, Any]:
    return RemoteBackend(pool=pool).run(program.graph(), {"ids": IDS}, None)
