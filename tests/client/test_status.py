"""`status` and `status --watch`: pools, replicas and requests, and how they change."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time

import msgspec
import pytest

from nnsight_hpc.wire.errors import Conflict
from nnsight_hpc.wire.messages import RequestStatus
from nnsight_hpc.wire.states import EndCause, ReplicaState, RequestState
from tests.client.program import PROGRAM, call, on_terminal, pool, replica
from tests.client.server import Server


def shown(server, *replicas, **changes) -> list[str]:
    """The lines of `status` with one pool of these replicas."""
    pool(server, *replicas)
    server.pools["smol"] = msgspec.structs.replace(server.pools["smol"], **changes)
    return call("status")[0].splitlines()


def cells(line: str) -> list[str]:
    return re.split(r"  +", line)


def test_status_shows_pools_and_requests(server):
    """Every pool, replica and request has a line; a request says what it waits for."""
    server.requests["r-a"] = RequestStatus(
        id="r-a", kind="run", pool="smol", state=RequestState.FAILED, user="alice", error=Conflict("no luck").report()
    )
    server.requests["r-b"] = RequestStatus(
        id="r-b",
        kind="run",
        pool="smol",
        state=RequestState.QUEUED,
        user="alice",
        position=2,
        waits_for="a worker loads",
    )
    lines = shown(server, replica(ReplicaState.PENDING, reason="waits for its turn"), queued=2, gpu_seconds=5400)
    assert lines[0].startswith("Daemon of alice on ")
    assert [cells(line) for line in lines[2:]] == [
        ["POOL", "MODEL", "SERVING", "QUEUED", "GPU HOURS"],
        ["smol", "m", "0/1", "2", "1.50"],
        [""],
        ["REPLICA", "STATE", "JOB", "HOST", "TIME LEFT", "DETAIL"],
        ["smol-1", "pending", "17", "waits for its turn"],
        [""],
        ["REQUEST", "KIND", "POOL", "STATE", "USER", "SINCE", "DETAIL"],
        ["r-a", "run", "smol", "failed", "alice", "no luck"],
        ["r-b", "run", "smol", "queued", "alice", "2 before it; a worker loads"],
    ]


def test_status_names_successors_time_left_and_what_was_loaded(server):
    """A hand-over can be followed: who serves for how long, who follows, and how far that one is."""
    old = replica(ReplicaState.BUSY, "smol-0", host="n1", ends=time.time() + 770)
    new = replica(ReplicaState.LOADING, loaded=1 << 30, total=4 << 30, succeeds="smol-0")
    *_, first, second = shown(server, old, new)
    assert re.fullmatch(r"smol-0 +busy +17 +n1 +12:\d\d +then smol-1", first)
    assert cells(second)[1:] == ["loading (1.0 GiB of 4.0 GiB)", "17", "follows smol-0"]


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        (EndCause.PREEMPTED, "ended (preempted)"),
        (EndCause.OUT_OF_MEMORY, "ended (out of memory)"),
        (EndCause.NODE_FAILED, "ended (node failed)"),
        (EndCause.WALLTIME, "ended (walltime)"),
        (EndCause.CANCELLED, "ended (cancelled)"),
        (EndCause.CRASHED, "ended (crashed)"),
    ],
)
def test_status_tells_ends_apart_while_nobody_serves(server, cause, words):
    """The last replica's end is of interest until another one serves."""
    ended = replica(ReplicaState.ENDED, "smol-0", cause=cause, reason="as it was\nwith more below")
    assert cells(shown(server, ended)[-1]) == ["smol-0", words, "17", "as it was"]
    assert cells(shown(server, ended, replica(ReplicaState.PENDING))[-2])[:2] == ["smol-0", words]
    assert "smol-0" not in "".join(shown(server, ended, replica(ReplicaState.READY)))


@pytest.mark.parametrize("cause", [EndCause.IDLE, EndCause.DRAINED])
def test_status_leaves_out_planned_ends_when_another_one_comes(server, cause):
    """They are shown while nothing is on its way: that is why nobody serves."""
    ended = replica(ReplicaState.ENDED, "smol-0", cause=cause)
    assert cells(shown(server, ended)[-1])[:2] == ["smol-0", f"ended ({cause.lower()})"]
    assert "smol-0" not in "".join(shown(server, ended, replica(ReplicaState.PENDING)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"held": Conflict("three failed starts").report()}, "held: three failed starts"),
        ({"down": True}, "is taken down"),
        ({"note": "a request starts a worker"}, "a request starts a worker"),
    ],
)
def test_status_has_a_line_where_a_pool_waits(server, changes, words):
    """Held, going, or what the daemon says it waits for."""
    assert shown(server, **changes)[-1] == f"smol: {words}"


def test_status_says_how_many_there_may_be(server):
    """Where that is a range."""
    spec = msgspec.structs.replace(shown_spec(server), replicas="0:3")
    assert "1/2 of 0:3" in shown(server, replica(ReplicaState.READY), spec=spec, desired=2)[3]


def shown_spec(server):
    pool(server)
    return server.pools["smol"].spec


# -- watch -------------------------------------------------------------------------------------------------------


@pytest.fixture
def watching(server):
    """`status --watch` as a process with pipes; ended as a person ends it."""
    pool(server, replica(ReplicaState.LOADING))
    processes: list[subprocess.Popen[str]] = []

    def watching(*options: str) -> subprocess.Popen[str]:
        command = [*PROGRAM, "status", "--watch", *options]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return processes[-1]

    yield watching
    for process in processes:
        process.kill()
        process.communicate()


def test_watch_goes_on_until_ctrl_c_which_is_no_error(server, watching):
    """As lines of JSON, each a whole answer: what changes comes by itself; the end is quiet."""
    process = watching("--json")
    assert json.loads(process.stdout.readline())["pools"][0]["replicas"][0]["state"] == "LOADING"
    pool(server, replica(ReplicaState.READY))
    assert json.loads(process.stdout.readline())["pools"][0]["replicas"][0]["state"] == "READY"
    process.send_signal(signal.SIGINT)
    assert (process.communicate(timeout=120), process.returncode) == (("", ""), 0)


def test_watch_waits_for_a_daemon_that_has_gone(base):
    """It says so, with what was last known, and goes on with the next daemon."""
    places = (base / "state" / "embedded", base / "run" / "e.sock")
    command = [*PROGRAM, "status", "--watch"]
    with Server(*places) as server:
        pool(server, replica(ReplicaState.LOADING))
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        until(process, "loading")
    try:
        until(process, "this is what was last known")
        with Server(*places) as server:
            pool(server, replica(ReplicaState.BUSY))
            until(process, "busy")
    finally:
        process.kill()
        process.communicate()


def until(process: subprocess.Popen[str], words: str) -> None:
    """Read on until a line has these words (else the test runs into its time limit)."""
    assert any(words in line for line in iter(process.stdout.readline, ""))


def test_watch_on_a_terminal_is_live(server):
    """Drawn in place, in colour, and ended by Ctrl-C without a word."""
    pool(server, replica(ReplicaState.READY))
    output = on_terminal([*PROGRAM, "status", "--watch"], typed=b"\x03", at="smol-1")
    assert "\x1b[32mready" in output
    assert "Traceback" not in output
    assert "Error" not in output
