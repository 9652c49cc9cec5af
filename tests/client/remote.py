"""A pool on this machine with a real daemon and a real worker that holds a tiny Llama, and programs for it."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from nnsight_hpc.client.backend import RemoteBackend
from nnsight_hpc.client.session import connect
from nnsight_hpc.graph import Graph, Ref, TensorRef
from nnsight_hpc.graph.build import FORWARD, LOG, LOOP, RANGE, READS, SAVE, GraphBuilder
from nnsight_hpc.graph.nodes import Source
from nnsight_hpc.wire.messages import ModelIdentity
from nnsight_hpc.wire.pools import PoolSpec, PoolStatus
from nnsight_hpc.wire.states import ReplicaState
from tests.local_account import local_account

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from nnsight_hpc.wire.http import HttpClient

IDS = torch.tensor([[3, 4, 5, 6, 7]])
LINE = Source("script.py", 7, "x = …")
BUDGET = 32 << 20


@contextmanager
def serving(model: Path) -> Iterator[str]:
    """A pool of one worker that serves, on the profile `local` of an account of its own."""
    with local_account(OMP_NUM_THREADS="1"):  # of the workers; otherwise threads of all tests fight for the cores
        daemon = connect("local")
        spec = PoolSpec(name="tiny", model=str(model), request_memory=BUDGET)
        daemon.put("/v1/pools/tiny", spec, PoolStatus)
        until_ready(daemon, "tiny")
        yield "tiny"
        daemon.call("POST", "/v1/stop?workers=1")
        daemon.close()


def until_ready(daemon: HttpClient, pool: str) -> None:
    """Wait until the newest replica of a pool serves; fails with the reason of one that has ended."""
    seen = ""
    while seen != ReplicaState.READY:
        replicas = daemon.get(f"/v1/pools/{pool}?wait=5&seen={seen}", PoolStatus).replicas
        seen = replicas[-1].state if replicas else ""
        assert seen != ReplicaState.ENDED, replicas[-1].reason


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


def endless() -> Program:
    """Says something, and computes for hours then: it has not ended by itself, however busy the machine is."""
    program = Program()
    mean = program.add("Tensor.mean", program.hidden())
    program.add(LOG, "begins", mean)
    matrix = program.add("torch.ones", [400, 400])
    loop = program.add(LOOP, program.add(RANGE, 0, 1_000_000, 1))
    product = program.add("torch.matmul", matrix, matrix, block=loop.id)
    program.add("Tensor.add_", mean, program.add("Tensor.mean", product, block=loop.id), block=loop.id)
    program.add("control.end", loop)
    program.save("last", mean)
    return program


def submit(program: Program, pool: str):
    return RemoteBackend(pool=pool).submit(program.graph(), {"ids": IDS}, None)


def run(program: Program, pool: str) -> dict[str, Any]:
    return RemoteBackend(pool=pool).run(program.graph(), {"ids": IDS}, None)
