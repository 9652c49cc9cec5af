"""Pools on Slurm as people use them: what `up` and `plan` say, growing and shrinking, one job at a time, and quiet."""

import itertools
import json
import re
import time

import pytest

from nnsight_hpc.storage import find_damage, read_manifest
from nnsight_hpc.wire.messages import RequestStatus
from nnsight_hpc.wire.names import new_request_id
from nnsight_hpc.wire.states import EndCause, ReplicaState
from tests.end_to_end.owner import ranks_of, until
from tests.rest import shares_at_rest
from tests.slurm.worker.graphs import capture_frame, dump_frame

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]

REASON = r"\[(Resources|Priority|None)\]"
"""Slurm's own word, behind ours: it has not looked at the job, or the job is the next one, or others are before it."""
SERVING = (ReplicaState.READY, ReplicaState.BUSY)
QUICK = {"poll": (3.0, 3.0), "scale_wait": 3.0}


@pytest.fixture(scope="module", autouse=True)
def gap(owner, tiny):
    """A pool of jobs of a minute, one at a time; its first walltime passes while other tests run."""
    owner.start(**QUICK)
    owner.up("gap", model=str(tiny), mem="1G", time="00:01:00", succession="gap")
    return owner.serving("gap")


@pytest.fixture(scope="module")
def connected(laptop):
    """The laptop keeps one connection open, as somebody who works does."""
    laptop.nnsight("connect", "--background")
    yield laptop
    laptop.nnsight("disconnect", check=False)  # where it was lost, commands have logged in anew


@pytest.fixture(scope="module")
def first(connected, owner, tiny):
    """What `up` said, and how long it took, while the cluster was full; the pool serves now."""
    other = owner.hold("--nodes=2", "--ntasks-per-node=3")
    until(lambda: owner.job_state(other) == "RUNNING", "a full cluster", 120)
    begun = time.monotonic()
    said = connected.nnsight("up", "first", "--model", str(tiny), "--cpus-per-task", "3").stdout
    seconds = time.monotonic() - begun
    status = json.loads(connected.nnsight("--json", "status").stdout)
    owner.cancel(other)
    owner.serving("first")
    return {"said": said, "seconds": seconds, "status": status}


def test_up_answers_while_the_job_waits(owner, first, capsys):
    """With the job's id, and Slurm's reason for waiting in words; it prints how soon."""
    replica = owner.serving("first")
    with capsys.disabled():
        print(f"\nup answered after {first['seconds']:.1f} s: {first['said']}")
    assert f"job {replica.job_id}" in first["said"]
    assert re.search(rf": [^:]+ {REASON}", first["said"])


def test_status_has_place_and_reason(first):
    """The job that waits has its place in the queue and its reason also in `status`."""
    [pool] = [pool for pool in first["status"]["pools"] if pool["spec"]["name"] == "first"]
    [replica] = pool["replicas"]
    assert replica["state"] == "PENDING"
    assert replica["position"] >= 1  # jobs of other pools may wait, too
    assert re.search(REASON, replica["reason"])


def test_explain_tells_the_story(connected, first, owner):
    """Of a pool from its submission to READY, with times; of a request, where it ran."""
    replica = owner.serving("first")
    told = connected.nnsight("explain", "first").stdout
    assert replica.job_id in told
    assert re.search(r"\d\d:\d\d:\d\d.*serves", told), told
    request = owner.send(capture_frame(), "first")
    owner.reached(request, "COMPLETED")
    assert replica.id in connected.nnsight("explain", request).stdout


def test_plan_is_a_script_that_joins_by_hand(connected, owner, tiny):
    """What `plan` prints is submitted with plain sbatch, and its worker serves the pool."""
    script = connected.nnsight("plan", "hand", "--model", str(tiny), "--mem", "1G").stdout
    assert script.startswith("#!/bin/bash")
    job = owner.on_login("sbatch", "--parsable", input=script).strip()
    replica = owner.serving("hand")
    assert replica.job_id == job
    request = owner.send(capture_frame(), "hand")
    assert owner.reached(request, "COMPLETED", "FAILED").state == "COMPLETED"


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("--partition", "nope", "gpu, scavenge"),
        ("--time", "3-00:00:00", "1-00:00:00"),
        ("--nodes", "3", "2"),
        ("--gres", "gpu:a100:1", "2 gpu"),
    ],
)
def test_what_slurm_would_refuse_is_refused_before(connected, owner, tiny, *, option, value, allowed):
    """A partition, walltime, number of nodes or type of GPU that is not there: refused with what is, nothing queued."""
    size = ["--tp", "3"] if option == "--nodes" else []
    for command in ("plan", "up"):
        ended = connected.nnsight(command, "bad", "--model", str(tiny), option, value, *size, check=False)
        assert ended.returncode == 2, ended.stderr
        assert allowed in ended.stderr
        assert ended.stdout == ""
    assert owner.jobs("--name=nnsight-hpc-bad") == []


def test_a_pool_grows_with_its_queue_and_shrinks_to_nothing(owner, tiny):
    """To two for a queue, never more pending than needed; idle, to none; a request brings it back, and says so."""
    owner.up("elastic", model=str(tiny), mem="1G", replicas="0:2", idle="8s", succession="gap")
    owner.serving("elastic")
    requests = [owner.send(capture_frame(forwards=500), "elastic") for _ in range(8)]
    counts = set()

    def all_done():
        counts.add(len(owner.replicas("elastic")))
        return all(owner.request(request).state == "COMPLETED" for request in requests)

    until(all_done, "the end of the queue", 240)
    assert max(counts) == 2
    until(lambda: owner.replicas("elastic") == [], "the release of both", 120)
    released = owner.replicas("elastic", ReplicaState.ENDED)
    assert [replica.cause for replica in released] == [EndCause.IDLE] * 2
    for replica in released:
        until(lambda job=replica.job_id: owner.job_state(job) == "COMPLETED", "the success of its job", 120)
    again = owner.send(capture_frame(), "elastic")
    assert owner.request(again).waits_for or owner.replicas("elastic", *SERVING)
    assert owner.reached(again, "COMPLETED", "FAILED").state == "COMPLETED"
    owner.down("elastic")


def test_two_jobs_write_one_dataset(owner, tiny, cluster):
    """The replica for which nothing waits helps with the dump that the other one has; all that they wrote is right."""
    owner.up("pair", model=str(tiny), mem="1G", replicas=2, succession="gap")
    until(lambda: len(owner.replicas("pair", *SERVING)) == 2, "both replicas", 180)
    frame = dump_frame(["one two three " * 40] * 4000, ("model.layers.0.output",), name="pair", batch_tokens=1024)
    request = new_request_id()
    owner.http.put(f"/v1/datasets/pair?pool=pair&request={request}", frame, RequestStatus)
    assert owner.reached(request, "COMPLETED", "FAILED").state == "COMPLETED"
    path = cluster.home("alice") / ".local/state/nnsight-hpc/slurm/datasets/pair.zarr"
    assert find_damage(path) == []
    assert len({entry.writer for entry in read_manifest(path) if entry.slice is not None}) == 2
    owner.down("pair")


def test_one_job_at_a_time(owner, gap):
    """In gap mode nothing is queued before the walltime has ended; requests wait, are told so, and run on the next job."""
    [last] = until(lambda: owner.replicas("gap"), "a job", 120)
    ended = owner.ended("gap", last.id, seconds=240)
    assert (ended.cause, ended.succeeds) == (EndCause.DRAINED, "")
    request = owner.send(capture_frame(), "gap")
    status = owner.request(request)
    assert status.waits_for or owner.replicas("gap", *SERVING)
    assert owner.reached(request, "COMPLETED", "FAILED").state == "COMPLETED"
    [following] = until(lambda: owner.replicas("gap"), "a job", 120)
    assert following.submitted > ended.changed - 1
    assert following.succeeds == ""
    assert "one job at a time" in owner.story("pools/gap")
    owner.down("gap")


@pytest.mark.parametrize("seconds", [pytest.param(10, id="short"), pytest.param(60, id="long", marks=pytest.mark.long)])
def test_an_idle_daemon_is_quiet(owner, first, tiny, seconds, capsys):
    """Slurm is asked at most once in 30 s for all pools; daemon and workers use under 1 % and 2 % of a core."""
    for name in ("second", "third"):
        owner.up(name, model=str(tiny), mem="1G")
    replicas = [owner.serving(name) for name in ("first", "second", "third")]
    owner.stop()
    owner.start()  # as it is for people, with no period changed
    begun = time.time()
    until(lambda: owner.calls.since(begun), "a first look at Slurm", 120)
    processes = [owner.daemon, *(ranks_of(replica.id)[0] for replica in replicas)]
    shares = shares_at_rest(processes, 0.01, seconds)
    until(lambda: len(owner.calls.since(begun)) > 1, "a second look", 120)
    calls = owner.calls.since(begun)
    pauses = [later.time - call.time for call, later in itertools.pairwise(calls)]
    with capsys.disabled():
        print(f"\nshares of a core: {shares}; {len(calls)} calls of Slurm's programs, pauses {pauses}")
    assert min(pauses) >= 25  # a call that a busy machine was slow to begin is noted late
    assert shares[0] < 0.01
    assert max(shares[1:]) < 0.02
