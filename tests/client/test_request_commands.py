"""The commands about requests, against a daemon that speaks the contract."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time

import pytest

from nnsight_hpc.wire.errors import Conflict
from nnsight_hpc.wire.frames import unpack
from nnsight_hpc.wire.messages import RequestStatus
from nnsight_hpc.wire.states import RequestState
from tests.client.program import PROGRAM, answer, call, pool

ID = "r-abcdefgh2345"


@pytest.fixture
def tensors(tmp_path):
    header = b'{"x":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'
    path = tmp_path / "in.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\1\2\3\4")
    return path


@pytest.fixture
def graph(tmp_path):
    path = tmp_path / "graph.json"
    path.write_text('{"format": "a graph"}')
    return path


def test_run_sends_graph_and_tensors_and_writes_the_result(server, graph, tensors, tmp_path):
    """The frame holds both files' bytes; the values are printed, the tensors written."""
    pool(server)
    out = tmp_path / "out.safetensors"
    output, errors = call("run", str(graph), "--pool", "smol", "--input", str(tensors), "--out", str(out))
    header, block = unpack(next(iter(server.bodies.values())))
    assert (header, bytes(block)) == (graph.read_bytes(), tensors.read_bytes())
    assert json.loads(output)["values"] == {"echo": len(graph.read_bytes())}
    assert out.read_bytes() == tensors.read_bytes()
    assert str(out) in errors


def test_run_says_how_it_is_to_run(server, graph):
    """How long it needs, that it shares no forward, and what it is among the user's own."""
    pool(server)
    call("run", str(graph), "--pool", "smol", "--needs", "1h30m")
    call("run", str(graph), "--pool", "smol", "--exclusive", "--priority", "-7")
    assert server.queries == [
        {"pool": "smol", "needs": "5400"},
        {"pool": "smol", "exclusive": "1", "priority": "-7"},
    ]


def test_run_under_a_key_is_one_request(server, graph):
    """Sent twice, it has one id; under another key, another one."""
    pool(server)
    for key in ("a", "a", "b"):
        call("run", str(graph), "--pool", "smol", "--idempotency-key", key)
    assert len(server.requests) == 2


def test_run_on_an_unknown_pool_names_the_pools(server, graph):
    """The daemon's refusal arrives as it is."""
    assert "there is no pool 'other'" in call("run", str(graph), "--pool", "other", code=4)[1]


def test_a_file_that_is_no_safetensors_is_refused(server, graph):
    """Before anything is sent."""
    assert "not a safetensors file" in call("run", str(graph), "--pool", "smol", "--input", str(graph), code=2)[1]
    assert server.bodies == {}


def test_out_is_checked_before_anything_runs(server, graph, tmp_path):
    """A folder that is not there is named at once, and nothing is sent."""
    missing = tmp_path / "absent"
    _, errors = call("run", str(graph), "--pool", "smol", "--out", str(missing / "x.safetensors"), code=2)
    assert str(missing) in errors.replace("\n", "")
    assert server.requests == {}


def test_a_dump_has_no_result_to_write(server, tmp_path):
    """`result` says where it lies instead."""
    status = RequestStatus(id=ID, kind="dump", pool="smol", state=RequestState.COMPLETED, user="alice")
    server.requests[ID] = status
    assert "is a dump" in call("result", ID, "--out", str(tmp_path / "x"), code=2)[1]


def queued(server, name=ID, **more):
    """A request in the queue."""
    server.requests[name] = RequestStatus(
        id=name, kind="run", pool="smol", **{"state": RequestState.QUEUED, "user": "alice", **more}
    )


def test_a_failed_request_is_the_commands_error(server):
    """`wait` and `result` end with the request's own error and its exit code."""
    queued(server)
    server.finish(ID, RequestState.FAILED, error=Conflict("it was not to be").report())
    for command in ("wait", "result"):
        assert "it was not to be" in call(command, ID, code=5)[1]


def test_a_cancelled_request_stays_in_the_list_of_all(server):
    """It leaves the queue, and waiting for it fails with code 10."""
    queued(server)
    assert ID in call("queue")[0]
    assert call("cancel", ID)[0] == f"{ID} cancelled\n"
    assert call("queue")[0] == "No requests.\n"
    assert "cancelled" in call("queue", "--all")[0]
    assert "was cancelled" in call("wait", ID, code=10)[1]


def test_wait_says_that_it_has_completed_and_result_brings_it(server, graph, tensors, tmp_path):
    """The result of a request that another process has sent, as often as it is asked for."""
    pool(server)
    call("run", str(graph), "--pool", "smol", "--input", str(tensors))
    (name,) = server.requests
    assert call("wait", name)[0] == f"{name} completed\n"
    out = tmp_path / "out.safetensors"
    for _ in range(2):
        assert json.loads(call("result", name, "--out", str(out))[0])["values"] == {"echo": len(graph.read_bytes())}
        assert out.read_bytes() == tensors.read_bytes()


def test_the_queue_is_in_the_order_in_which_requests_go(server):
    """What runs, then what waits, the next one first, with its place and when it is expected to start."""
    queued(server, "r-third", position=1, starts=time.time() + 175)
    queued(server, "r-second", position=0)
    queued(server, "r-first", state=RequestState.RUNNING)
    queued(server, "r-gone", state=RequestState.EXPIRED)
    lines = call("queue")[0].splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["r-first", "r-second", "r-third"]
    assert re.search(r"1 before it, expected start \d\d:\d\d:\d\d, in 2:\d\d$", lines[3])
    assert [one["id"] for one in answer("queue", "--all")] == ["r-gone", "r-first", "r-second", "r-third"]


def test_a_queue_that_is_longer_than_asked_for_says_so(server):
    """`--limit` is what the daemon is asked for; with as many as that there may be more."""
    queued(server, position=0)
    queued(server, name=ID.replace("r-a", "r-b"), position=1)
    assert "more wait" not in call("queue")[0]
    assert "more wait than these 2: nnsight-hpc queue --limit N" in call("queue", "--limit", "2")[0]
    assert [query.get("limit") for query in server.queries] == ["100", "2"]
    assert "0 is not in the range" in call("queue", "--limit", "0", code=2)[1]


def test_show_has_each_state_with_its_time(server):
    """How long it stayed in each, and until now in the last; then what came of it."""
    now = time.time()
    times = {"RECEIVED": now - 100, "QUEUED": now - 99, "LEASED": now - 39, "RUNNING": now - 38}
    queued(server, state=RequestState.RUNNING, times=times, note="it runs again")
    head, _, titles, *rows = call("show", ID)[0].splitlines()
    assert head == f"Request {ID}, a run of alice: running on smol: it runs again"
    assert titles.split() == ["STATE", "SINCE", "FOR"]
    assert [(row.split()[0], row.split()[-1]) for row in rows[:3]] == [
        ("received", "0:01"),
        ("queued", "1:00"),
        ("leased", "0:01"),
    ]
    assert re.fullmatch(r"running .*0:(3|4)\d", rows[3])
    failure = Conflict("it was not to be", next="try again").report()
    queued(server, state=RequestState.FAILED, times={"FAILED": now}, error=failure)
    shown = call("show", ID)[0].splitlines()
    assert [len(shown[3].split()), *shown[5:]] == [2, "it was not to be", "  next: try again"]
    assert answer("show", ID)["times"] == {"FAILED": now}


def test_ctrl_c_while_waiting_leaves_the_request_and_says_so(server, graph, environment):
    """Exit code 130, no traceback, and how to go on."""
    pool(server)
    server.hold.clear()
    process = subprocess.Popen([*PROGRAM, "run", str(graph), "--pool", "smol"], stderr=subprocess.PIPE, text=True)
    while server.looks < 2:  # then it waits
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert f"nnsight-hpc wait {next(iter(server.requests))}" in errors
    assert "Traceback" not in errors
