"""Requests outlive the daemon, the client and its sleep: a real daemon, a real worker, a tiny Llama, real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from nnsight_hpc.client.backend import RemoteBackend
from nnsight_hpc.client.requests import find
from nnsight_hpc.client.session import connect
from nnsight_hpc.graph.nodes import Source
from nnsight_hpc.wire.errors import Conflict
from nnsight_hpc.wire.messages import Hello, RequestStatus, Story
from nnsight_hpc.wire.states import RequestState
from tests.client.remote import IDS, run, serving, slow
from tests.daemon.process import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

FORWARDS = 1500
"""A request that takes a second or more."""


@pytest.fixture(scope="module")
def pool(tiny_llama) -> Iterator[str]:
    with serving(tiny_llama) as name:
        yield name


def script(key: str) -> subprocess.Popen[str]:
    """A program that runs the request under this key and prints the sum of what comes back."""
    code = f"""
from tests.client.test_survival import total
print(total({key!r}))
"""
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def total(key: str) -> float:
    backend = RemoteBackend(pool="tiny", idempotency_key=key)
    return backend.run(slow(FORWARDS).graph(), {"ids": IDS}, None)["last"].double().sum().item()


def known() -> dict[str, RequestStatus]:
    """The requests that there are."""
    daemon = connect("local")
    found = daemon.get("/v1/requests", list[RequestStatus])
    daemon.close()
    return {one.id: one for one in found}


def kill_the_daemon() -> int:
    """Its process, which is gone; whoever asks next starts another one."""
    daemon = connect("local")
    process = daemon.get("/v1/hello", Hello).pid
    daemon.close()
    os.kill(process, signal.SIGKILL)
    return process


def test_a_blocking_run_outlives_its_daemon(pool):
    """Killed twice while a script waits: the script gets its values, and the worker has run it once."""
    results, before = [], known()
    thread = threading.Thread(target=lambda: results.append(run(slow(FORWARDS), pool)))
    thread.start()
    request = begun(before)
    assert len({kill_the_daemon() for _ in range(2)}) == 2
    thread.join()
    assert list(results[0]) == ["last"]
    assert attempts(request) == 1


def test_the_result_of_a_killed_client_is_there_for_another_process(pool):
    """By the request's id, and by sending it again under its key: that makes no second request."""
    before = known()
    with script("once") as client:
        request = begun(before)
        client.kill()
    expected = find(request).result()["last"].double().sum().item()
    before = known()
    assert total("once") == expected
    assert known().keys() == before.keys()
    assert attempts(request) == 1


def test_a_client_that_slept_gets_its_values(pool):
    """Stopped, as by a laptop's lid: the request ends meanwhile, and the daemon is another one when it wakes."""
    before = known()
    with script("asleep") as client:
        request = begun(before)
        client.send_signal(signal.SIGSTOP)
        expected = find(request).result()["last"].double().sum().item()
        kill_the_daemon()
        client.send_signal(signal.SIGCONT)
        assert float(client.communicate()[0].splitlines()[-1]) == expected
    assert attempts(request) == 1


def test_what_is_sent_twice_at_once_runs_once(pool):
    """Four threads under one key: one request, and its values for each of them."""
    results = []
    backend = [RemoteBackend(pool=pool, idempotency_key="at once") for _ in range(4)]
    before = known()
    threads = [
        threading.Thread(target=lambda one=one: results.append(one.run(slow(20).graph(), {"ids": IDS}, None)))
        for one in backend
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(known().keys() - before.keys()) == 1
    assert len(results) == 4
    assert all(torch.equal(values["last"], results[0]["last"]) for values in results)


def test_another_program_under_a_used_key_is_refused(pool):
    """Its author would take the first one's values for its own; the lines that it was written at do not count."""
    backend, program, moved = RemoteBackend(pool=pool, idempotency_key="used"), slow(2).graph(), slow(2).graph()
    nodes = tuple(replace(node, source=Source("elsewhere.py", 1, "…")) for node in moved.nodes)
    first = backend.submit(program, {"ids": IDS}, None)
    assert backend.submit(replace(moved, nodes=nodes), {"ids": IDS}, None).id == first.id
    for other, ids in ((slow(3).graph(), IDS), (program, IDS + 1)):
        with pytest.raises(Conflict, match="other content"):
            backend.submit(other, {"ids": ids}, None)


def begun(before: dict[str, RequestStatus]) -> str:
    """The request that there was not before, as soon as it runs (or has, where nobody looked in time)."""

    def look() -> list[str]:
        new = [one for one in known().values() if one.id not in before]
        return [one.id for one in new if one.state == RequestState.RUNNING or one.state.ended]

    return wait_for(look)[0]


def attempts(request: str) -> int:
    """How often it was given to a worker, by its story."""
    daemon = connect("local")
    story = daemon.get(f"/v1/requests/{request}/story", Story)
    daemon.close()
    return sum("given to a worker" in event.text for event in story.events)
