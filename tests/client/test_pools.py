"""What the commands about pools send, print, and end with."""

from __future__ import annotations

import re
import time

import msgspec
import pytest

from nnsight_hpc.wire.errors import Conflict, ReplicaFailed
from nnsight_hpc.wire.messages import Event, LogLine, RequestStatus, Story
from nnsight_hpc.wire.pools import Garbage, PoolSpec, PoolStatus
from nnsight_hpc.wire.states import EndCause, ReplicaState, RequestState
from tests.client.program import answer, call, once, pool, replica

# -- up ----------------------------------------------------------------------------------------------------------


def test_up_sends_the_options_and_says_job_and_reason(server):
    """All of `PoolSpec` can be given, and what Slurm says comes back in words."""
    server.replicas = [replica(ReplicaState.PENDING, reason="waits for other jobs (Priority)")]
    options = "--replicas 2 --nodes 3 --tp 12 --gpus-per-node 4 --gres gpu:4 --cpus-per-task 8 --mem 16G"
    names = "--time 2:00:00 --partition p --account a --qos q --constraint c --reservation r --mpi pmix"
    more = [
        "--dtype",
        "bfloat16",
        "--revision",
        "v1",
        "--setup",
        "module load x",
        "--setup",
        "y",
        "--sbatch-arg=--nice",
    ]
    output, _ = call("up", "smol", "--model", "/models/m", *options.split(), *names.split(), *more)
    assert output == "Pool smol: pending job 17: waits for other jobs (Priority)\n"
    assert server.pools["smol"].spec == PoolSpec(
        name="smol", model="/models/m", replicas=2, nodes=3, tp=12, gpus_per_node=4, gres="gpu:4",
        cpus_per_task=8, mem="16G", time="2:00:00", partition="p", account="a", qos="q", constraint="c", reservation="r",
        mpi="pmix", dtype="bfloat16", revision="v1", setup=("module load x", "y"), sbatch_args=("--nice",),
    )  # fmt: skip


def test_a_model_that_lies_here_is_sent_as_an_absolute_path(server, tmp_path, monkeypatch):
    """A folder, or a factory's one file: the local daemon has another working folder."""
    (tmp_path / "model").mkdir()
    (tmp_path / "weights.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    for name in ("model", "weights.safetensors"):
        call("up", "smol", "--model", name)
        assert server.given["smol"]["model"] == str(tmp_path / name)


def test_up_wait_returns_when_the_replica_serves(server):
    """It waits through pending and loading; what ended before is not held against it."""
    pool(server, replica(ReplicaState.ENDED, "smol-0", reason="cancelled"))
    server.replicas = [
        replica(ReplicaState.PENDING),
        replica(ReplicaState.LOADING, loaded=5, total=10),
        replica(ReplicaState.READY, host="n1"),
    ]
    assert call("up", "smol", "--model", "m", "--wait")[0] == "Pool smol: ready job 17 on n1\n"


def test_up_wait_fails_with_the_log_of_a_replica_that_ended(server):
    """A job that ends before it serves: its reason and its last lines, and exit code 9."""
    tail = "OSError: /models/absent does not exist"
    crashed = replica(ReplicaState.ENDED, cause=EndCause.CRASHED, reason="exit code 1", tail=tail)
    server.replicas = [replica(ReplicaState.STARTING), crashed]
    _, errors = call("up", "smol", "--model", "/models/absent", "--wait", code=9)
    assert "ended before it could serve (crashed)" in errors
    assert "exit code 1" in errors
    assert "OSError: /models/absent does not exist" in errors


def test_up_wait_does_not_mind_the_end_of_replicas_that_make_way(server):
    """One that drains already (after `down`), and one of the old model, end while the new one loads."""
    pool(server, replica(ReplicaState.DRAINING, "smol-0"))
    server.replicas = [
        replica(ReplicaState.PENDING),
        replica(ReplicaState.ENDED, "smol-0", reason="drained"),
        replica(ReplicaState.READY),
    ]
    assert call("up", "smol", "--model", "m", "--wait")[0] == "Pool smol: ready job 17\n"
    pool(server, replica(ReplicaState.LOADING))
    server.replicas = [
        replica(ReplicaState.PENDING, "smol-2"),
        replica(ReplicaState.ENDED, reason="cancelled"),
        replica(ReplicaState.READY, "smol-2"),
    ]
    assert call("up", "smol", "--model", "other", "--wait")[0] == "Pool smol: ready job 17\n"


def test_up_wait_goes_on_when_nobody_is_to_blame(server):
    """A preempted worker is replaced; that is no failure of what was asked for."""
    server.replicas = [
        replica(ReplicaState.LOADING),
        replica(ReplicaState.ENDED, cause=EndCause.PREEMPTED),
        replica(ReplicaState.READY, "smol-2"),
    ]
    assert call("up", "smol", "--model", "m", "--wait")[0] == "Pool smol: ready job 17\n"


def test_up_wait_ends_when_the_pool_is_held(server):
    """Nothing more will come."""
    server.replicas = [replica(ReplicaState.LOADING)]
    held = PoolStatus(spec=PoolSpec(name="smol", model="m"), desired=1, held=ReplicaFailed("three in a row").report())
    once(lambda: server.pools, lambda: server.pools.update(smol=held))
    assert "three in a row" in call("up", "smol", "--model", "m", "--wait", code=9)[1]


def test_up_wait_wants_one_worker_where_there_may_be_none_later(server):
    """Of `0:3` one is started at once, since a person asked."""
    server.replicas = [replica(ReplicaState.LOADING), replica(ReplicaState.READY)]
    assert call("up", "smol", "--model", "m", "--replicas", "0:3", "--wait")[0] == "Pool smol: ready job 17\n"
    assert server.pools["smol"].spec.replicas == "0:3"


def test_up_says_place_and_expected_start(server):
    """As Slurm knows them, with how far off the start is; the next command goes to stderr."""
    begins = time.time() + 4000
    server.replicas = [replica(ReplicaState.PENDING, reason="waits", position=3, begins=begins)]
    output, errors = call("up", "smol", "--model", "m")
    assert re.fullmatch(
        r"Pool smol: pending job 17: waits; place 3 in its partition's queue, expected start .*, in 1:06:\d\d\n", output
    )
    assert "nnsight-hpc explain smol" in errors


def test_only_what_is_given_is_sent(server):
    """The site's defaults have to find the gaps."""
    call("up", "smol", "--model", "m", "--tp", "2")
    assert server.given["smol"] == {"name": "smol", "model": "m", "tp": 2}


def test_a_held_pool_is_the_commands_error(server):
    """The daemon's own reason for starting no more replicas, with its exit code."""
    server.held = ReplicaFailed("the pool is held").report()
    assert "the pool is held" in call("up", "smol", "--model", "m", code=9)[1]
    assert "held: the pool is held" in call("status")[0]


# -- plan --------------------------------------------------------------------------------------------------------


def test_plan_prints_the_script_alone_on_stdout(server):
    """So that `plan NAME > job.sh` keeps it; what else is known goes to stderr."""
    server.starts = time.time() + 600
    output, errors = call("plan", "smol", "--model", "m", "--nodes", "2")
    assert output == "#!/bin/bash\nexit\n"
    assert "Note: sinfo did not answer" in errors
    assert re.search(r"Expected start: .*, in (10:00|9:\d\d)\.", errors)
    assert "lies at /r/script;" in errors
    assert server.given["smol"] == {"name": "smol", "model": "m", "nodes": 2}
    assert server.pools == {}


def test_plan_as_json_has_all_of_it(server):
    """A program gets script, path, notes and the spec with all defaults."""
    found = answer("plan", "smol", "--model", "m")
    assert (found["script"], found["path"], found["spec"]["time"]) == ("#!/bin/bash\nexit\n", "/r/script", "01:00:00")


# -- resume, explain, gc -----------------------------------------------------------------------------------------


def test_resume_starts_a_held_pool_again(server):
    """It says how the pool stands, as `up` does."""
    pool(server, replica(ReplicaState.PENDING, reason="waits"))
    server.pools["smol"] = msgspec.structs.replace(server.pools["smol"], held=Conflict("held").report())
    assert call("resume", "smol")[0] == "Pool smol: pending job 17: waits\n"
    assert server.pools["smol"].held is None


@pytest.mark.parametrize("name", ["smol", "r-abcdefgh2345"])
def test_explain_tells_the_story_with_times(server, name):
    """Of a pool, or of a request: the oldest first, and how it stands in the end."""
    earlier, today = Event(time=90000.0, text="asked for"), Event(time=time.time(), text="starts", replica="smol-1")
    server.stories[name] = Story(now="one worker loads", events=(earlier, today))
    lines = call("explain", name)[0].splitlines()
    assert lines[0].split() == ["TIME", "REPLICA", "WHAT", "HAPPENED"]
    assert re.fullmatch(r"1970-01-0\d \d\d:\d\d:\d\d +asked for", lines[1])
    assert re.fullmatch(r"\d\d:\d\d:\d\d +smol-1 +starts", lines[2])
    assert lines[-1] == "Now: one worker loads"
    assert answer("explain", name)["events"][1]["replica"] == "smol-1"


def test_explain_has_the_log_of_what_failed_while_nobody_serves(server):
    """Its last lines stand before how it is now."""
    ended = replica(ReplicaState.ENDED, cause=EndCause.OUT_OF_MEMORY, tail="Killed\nat last")
    server.stories["smol"] = Story(now="the next one is submitted")
    for serving, shown in (((), True), ((replica(ReplicaState.READY, "smol-2"),), False)):
        pool(server, ended, *serving)
        log = "The last lines of the log of smol-1, ended (out of memory):\nKilled\nat last\n\nNow: "
        assert (log in call("explain", "smol")[0]) == shown


@pytest.mark.parametrize(
    ("options", "dry", "did"),
    [(["--yes"], ["1", "0"], "Cancelled job 17"), (["--dry-run"], ["1"], "Would cancel job 17")],
)
def test_gc_says_what_it_removes(server, base, options, dry, did):
    """Or would remove: on the cluster, and here what was half fetched."""
    half = base / "acts.zarr.partial"
    half.mkdir()
    options = [*options, "--in", str(base)]
    server.garbage = Garbage(jobs=("17",), folders=("/r/old",))
    output, _ = call("gc", *options)
    assert did in output
    assert "/r/old" in output
    assert str(half) in output
    assert half.exists() == (dry == ["1"])
    assert server.queries == [{"dry": one} for one in dry]
    server.garbage = Garbage()
    assert call("gc", "--in", str(base / "home"))[0] == "Nothing is left over.\n"


def test_gc_asks_before_it_removes(server, base):
    """Nobody who could answer: nothing is removed."""
    server.garbage = Garbage(jobs=("17",))
    assert "Cancel and remove this?" in call("gc", "--in", str(base), code=130)[1]
    assert server.queries == [{"dry": "1"}]


# -- down --------------------------------------------------------------------------------------------------------


def test_down_ends_the_pool(server):
    """With --wait it returns when nothing is left."""
    pool(server, replica(ReplicaState.READY))
    assert call("down", "smol", "--wait")[0] == "Pool smol: no worker is left.\n"
    assert server.pools == {}
    assert "there is no pool 'smol'" in call("down", "smol", code=4)[1]


def test_down_all_ends_every_pool_and_every_job_of_ours(server):
    """It tells jobs that no pool knew, and waits for the workers where asked to."""
    pool(server, replica(ReplicaState.READY))
    server.garbage = Garbage(jobs=("12",))
    assert call("down", "--all")[0] == "Cancelled job 12\nAll pools: 1 worker finishes and ends.\n"
    pool(server, replica(ReplicaState.READY))
    once(lambda: server.pools["smol"].down, lambda: pool(server, replica(ReplicaState.ENDED)))
    assert call("down", "--all", "--wait")[0].endswith("All pools: no worker is left.\n")


# -- logs --------------------------------------------------------------------------------------------------------


def test_logs_follows_until_the_replica_has_ended(server):
    """Reading on where it stopped, of the same replica and rank."""
    pool(server)
    server.logs = ["one\n", "two\n", "three\n"]
    output, errors = call("logs", "smol", "-f", "--rank", "1", "--lines", "7")
    assert output == "one\ntwo\nthree\n"
    assert "Replica smol-1 has ended" in errors
    first, second, third = server.queries
    assert first == {"rank": "1", "lines": "7"}
    assert (second["from"], second["replica"], second["rank"], float(second["wait"]) > 0) == ("1", "smol-1", "1", True)
    assert third["from"] == "2"
    assert answer("logs", "smol", "-f")["text"] == output


def test_logs_prints_the_pools_log(server):
    """And names the pools where there is none of that name."""
    pool(server)
    assert call("logs", "smol")[0] == "the replica's log\n"
    assert "there are: smol" in call("logs", "other", code=4)[1]


def test_logs_shows_what_a_request_says(server):
    """So far, or with -f until its end."""
    name = "r-abcdefgh2345"
    server.requests[name] = RequestStatus(id=name, kind="run", pool="smol", state=RequestState.RUNNING, user="alice")
    server.said[name] = [LogLine(text=f"line {number}", source="x.py:3: log(…)") for number in range(3)]
    server.hold.clear()
    assert call("logs", name)[0] == "line 0\nline 1\nline 2\n"
    server.hold.set()
    assert call("logs", name, "-f")[0] == "line 0\nline 1\nline 2\n"
    assert server.requests[name].state == RequestState.COMPLETED
    said = answer("logs", name)
    assert (said["request"], said["log"][2]["text"], said["log"][2]["source"]) == (name, "line 2", "x.py:3: log(…)")
    assert "no request" in call("logs", "r-zzzzzzzz2345", code=4)[1]


@pytest.mark.parametrize(("given", "expected"), [("500", 500), ("2K", 2048), ("3m", 3 << 20), ("8G", 8 << 30)])
def test_up_takes_the_memory_of_a_request(server, given, expected):
    """As Slurm writes sizes."""
    call("up", "smol", "--model", "m", "--request-memory", given)
    assert server.pools["smol"].spec.request_memory == expected


@pytest.mark.parametrize("given", ["", "G", "8X", "-1", "1.5G", "8GB"])
def test_up_refuses_what_is_no_size(base, given):
    """And says what one looks like."""
    assert "500M or 8G" in call("up", "smol", "--model", "m", "--request-memory", given, code=2)[1]
