"""Workers and jobs that fail: the pool heals or says what to do, and no request is lost, nor run for ever."""

import signal

import pytest

from nnsight_hpc.wire.errors import ReplicaFailed
from nnsight_hpc.wire.states import EndCause, ReplicaState
from tests.end_to_end.healing import QUICK, is_answered, runner, running
from tests.end_to_end.owner import kill, ranks_of, until
from tests.slurm.worker.graphs import capture_frame, endless_frame

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]


@pytest.fixture(scope="module")
def owner(owner):
    owner.start(**QUICK)
    return owner


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_named_and_its_request_runs_again(owner, two, rank):
    """Kill -9 of rank 0 or of another one: the end names it, another replica comes, the request completes there."""
    request, replica = running(owner, two, forwards=150)
    kill(ranks_of(replica.id)[rank])
    ended = owner.ended(two, replica.id)
    assert ended.cause == EndCause.CRASHED
    assert f"rank {rank} on n{rank + 1} was killed" in ended.reason
    assert owner.reached(request, "COMPLETED", "FAILED").state == "COMPLETED"
    assert owner.serving(two).id != replica.id


def test_a_request_that_kills_its_worker_twice_is_not_tried_again(owner, one):
    """The second worker that dies under it is the last: it fails with that reason, and the pool goes on."""
    request = owner.send(endless_frame(), one)
    killed = []
    for _ in range(2):
        replica = runner(owner, one, request)
        kill(ranks_of(replica.id)[0])
        killed.append(owner.ended(one, replica.id))
    failed = owner.reached(request, "FAILED")
    assert [replica.cause for replica in killed] == [EndCause.CRASHED] * 2
    assert "two replicas" in str(failed.error)
    assert owner.serving(one).id not in {replica.id for replica in killed}
    assert is_answered(owner, one)


def test_a_job_that_its_user_cancels_is_replaced(owner, one):
    """`scancel` past us is told apart from a failure, and does not count as one."""
    request, replica = running(owner, one)
    owner.cancel(replica.job_id)
    ended = owner.ended(one, replica.id)
    assert ended.cause == EndCause.CANCELLED
    assert owner.reached(request, "COMPLETED", "FAILED").state == "COMPLETED"
    assert owner.serving(one).id != replica.id


def test_a_hanging_worker_is_ended_and_replaced(owner, one):
    """One that is stopped in the middle of a request is lost after a while; the request runs elsewhere."""
    request, replica = running(owner, one)
    ranks_of(replica.id)[0].send_signal(signal.SIGSTOP)
    ended = owner.ended(one, replica.id)
    assert ended.cause == EndCause.LOST
    assert owner.reached(request, "COMPLETED", "FAILED").state == "COMPLETED"
    assert ranks_of(replica.id) == {}


def test_a_preempted_pool_waits_its_turn_and_comes_back(owner, two, tiny):
    """A job of the other partition takes the node: the pool says so, waits with a reason in words, and serves again."""
    cores, node = 2, "n2"  # one of four is a rank's of the other pool: no two such jobs have room
    place = {"partition": "scavenge", "cpus_per_task": cores, "sbatch_args": [f"--nodelist={node}"]}
    owner.up("cheap", model=str(tiny), mem="1G", **place)
    replica = owner.serving("cheap")
    other = owner.hold("--partition=gpu", f"--nodelist={node}", f"--cpus-per-task={cores}")
    ended = owner.ended("cheap", replica.id)
    assert ended.cause == EndCause.PREEMPTED
    waiting = until(lambda: owner.replicas("cheap", ReplicaState.PENDING), "a replica that waits", 120)
    assert until(lambda: owner.replica("cheap", waiting[0].id).reason, "a reason", 120)
    owner.cancel(other)
    assert owner.serving("cheap").id == waiting[0].id
    assert owner.pool("cheap").held is None
    owner.down("cheap")


def test_three_failed_starts_hold_the_pool_until_it_is_resumed(owner, tiny, cluster):
    """The pool says why, with the log's last lines, and starts nothing more; mended and resumed, it serves."""
    mended = cluster.scratch / "mended"
    setup = [f"test -e {mended} || {{ echo the licence is missing; exit 7; }}"]
    owner.up("wrong", model=str(tiny), mem="1G", setup=setup)
    held = until(lambda: owner.pool("wrong").held, "that the pool is held", 120)
    assert "3 times in a row" in held.what
    assert "the licence is missing" in held.why
    failed = owner.replicas("wrong", ReplicaState.ENDED)
    assert [replica.cause for replica in failed] == [EndCause.CRASHED] * 3
    assert owner.replicas("wrong") == []
    with pytest.raises(ReplicaFailed, match="is held"):
        owner.send(capture_frame(), "wrong")
    mended.touch()
    owner.http.call("POST", "/v1/pools/wrong/resume")
    owner.serving("wrong")
    assert owner.pool("wrong").held is None
    owner.down("wrong")


def test_a_worker_that_never_registers_is_ended(owner, tiny):
    """A job that runs without a word of its worker is cancelled, with what stands in its log."""
    owner.stop()
    owner.start(**QUICK, register=6.0)  # too short for a busy machine, where a good worker may need more
    owner.up("silent", model=str(tiny), mem="1G", setup=["echo waits for a licence", "sleep 600"])
    first = until(lambda: owner.replicas("silent", ReplicaState.ENDED), "the end of the first", 120)[0]
    assert first.cause == EndCause.LOST
    assert "waits for a licence" in first.tail
    until(lambda: owner.job_state(first.job_id) == "CANCELLED", "the end of its job", 120)
    owner.down("silent")
    owner.stop()
    owner.start(**QUICK)
