"""The commands about pools against a real daemon on this machine, with real workers."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest

from nnsight_hpc.client import config
from nnsight_hpc.execution.values import save_tensors
from tests.client.program import answer, call
from tests.client.remote import IDS, Program

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def defined(base: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A pool `tiny` of at most one replica; the daemon and its workers are stopped in the end."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = config.config_file()
    path.parent.mkdir()
    path.write_text(f'[pool.tiny]\nmodel = "{tiny_llama}"\nreplicas = "0:1"\nidle = "1h"\n')
    yield
    call("daemon", "stop", "--workers")


def test_a_pool_is_planned_released_and_comes_back(defined, tmp_path):
    """From its definition to a request that finds it at zero, waits and is told for what, and the story of it all."""
    assert call("plan", "tiny")[0].startswith("#!/bin/bash\n")
    assert call("up", "tiny", "--wait")[0].startswith("Pool tiny: ready job ")
    call("up", "tiny", "--idle", "1s")
    ended = until(lambda: [one for one in of_tiny("replicas") if one["state"] == "ENDED"])
    assert ended[0]["cause"] == "IDLE"
    assert "no replica: one is started when a request arrives" in call("status")[0]

    errors = call("run", *forward(tmp_path), "--pool", "tiny", "--needs", "1s", "--out", str(tmp_path / "out"))[1]
    assert ": queued on tiny: job " in errors

    story = call("explain", "tiny")[0]
    for words in ("asked for", "submitted as job", "it serves", "ended (idle)"):
        assert words in story
    [request] = answer("queue", "--all")
    assert len(answer("explain", request["id"])["events"]) >= 3
    assert answer("logs", "tiny", "--replica", ended[0]["id"])["ended"]
    assert call("down", "--all", "--wait")[0].endswith("All pools: no worker is left.\n")
    until(lambda: call("gc", "--dry-run")[0] == "Nothing is left over.\n")


def of_tiny(key: str) -> Any:
    return answer("status")["pools"][0][key]


def until(look: Callable[[], Any]) -> Any:
    """What `look` finds once it finds anything (else the test runs into its time limit)."""
    while not (found := look()):
        time.sleep(0.2)
    return found


def forward(folder: Path) -> list[str]:
    """The arguments of `run` for a forward of the tiny model."""
    program = Program()
    program.save("hidden", program.hidden())
    graph, tensors = folder / "graph.json", folder / "in.safetensors"
    graph.write_text(program.graph().to_json())
    tensors.write_bytes(save_tensors({"ids": IDS}))
    return [str(graph), "--input", str(tensors)]
