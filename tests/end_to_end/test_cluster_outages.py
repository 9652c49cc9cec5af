"""Nodes, Slurm's controller and the daemon's own files that are gone: the pool heals, and nothing of ours is orphaned."""

import json
import shutil
import time

import pytest

from nnsight_hpc.wire.states import EndCause, ReplicaState
from tests.end_to_end.healing import QUICK, is_answered, running
from tests.end_to_end.owner import ranks_of, until

TWO_MINUTES = 120
pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]


@pytest.fixture(scope="module")
def owner(owner):
    owner.start(**QUICK)
    return owner


def test_a_failed_node_and_a_node_without_network(owner, one, cluster):
    """Slurm's daemon on a node dies, and later the other node's cable is pulled: each time the pool goes to the other.

    What ran is run again, and the worker that nobody could reach is ended when its node comes back.
    """
    first = owner.serving(one)
    cluster.stop_service(first.host, "slurmd")
    second = owner.serving(one, but=(first.id,))
    assert owner.ended(one, first.id).cause == EndCause.NODE_FAILED
    assert second.host != first.host
    cluster.start_service(first.host, "slurmd")
    request, cut = running(owner, one)
    assert cut.id == second.id
    cluster.cut_off(second.host)
    try:
        third = owner.serving(one, but=(first.id, second.id))
        assert owner.ended(one, second.id).cause in (EndCause.NODE_FAILED, EndCause.LOST)  # whoever notices first
        assert third.host == first.host
        assert owner.reached(request, "COMPLETED", "FAILED").state == "COMPLETED"
    finally:
        cluster.join(second.host)
    until(lambda: not {**ranks_of(first.id), **ranks_of(second.id)}, "the end of the lost workers", 120)
    cluster.wait_states({"idle", "mixed", "allocated"}, timeout=120)  # Slurm can use both again


@pytest.mark.parametrize(
    "seconds", [pytest.param(12, id="short"), pytest.param(TWO_MINUTES, id="long", marks=pytest.mark.long)]
)
def test_slurms_controller_is_away(owner, one, tiny, cluster, seconds):
    """Requests go on, nothing is given up, and a pool that was asked for meanwhile starts when it is back."""
    owner.settled(one)
    replicas = owner.replicas(one)
    cluster.stop_service("login", "slurmctld")
    stopped = time.monotonic()
    try:
        owner.up("late", model=str(tiny), mem="1G")
        assert is_answered(owner, one)
        until(lambda: "Slurm" in owner.pool("late").note, "that the new pool waits for Slurm", 120)
        time.sleep(max(0.0, seconds - (time.monotonic() - stopped)))
    finally:
        cluster.start_service("login", "slurmctld")
    assert owner.serving("late")
    assert owner.pool("late").held is None
    assert {before.id for before in replicas} <= {left.id for left in owner.replicas(one)}
    owner.down("late")


@pytest.mark.parametrize("answer", ["", "slurm_load_jobs error: \x1f\x1f 17 ?\x1f\n\x00"], ids=["empty", "garbled"])
def test_a_wrong_answer_of_squeue_is_not_believed(owner, one, answer):
    """Once nothing, once nonsense: no replica is given up, and none is submitted."""
    owner.settled(one)
    replicas, jobs = owner.replicas(one), owner.jobs()
    owner.calls.answer_once("squeue", answer)
    until(lambda: owner.calls.answered("squeue"), "a squeue of the daemon", 120)
    since = time.time()
    until(lambda: len(owner.calls.since(since)) >= 2, "two more looks at Slurm", 120)
    assert [left.id for left in owner.replicas(one)] == [before.id for before in replicas]
    assert owner.jobs() == jobs
    assert is_answered(owner, one)


def test_nothing_of_ours_is_orphaned(owner, one, two, laptop, tiny):
    """Without the daemon's state, workers are taken up again, and `gc` and `down --all` find every job in Slurm itself."""
    before = owner.serving(one)
    other = owner.hold("--cpus-per-task=2", "--nodes=2", "--ntasks-per-node=1")
    owner.up("waiting", model=str(tiny), mem="1G", nodes=2, tp=2, cpus_per_task=3)
    [waiting] = until(lambda: owner.replicas("waiting", ReplicaState.PENDING), "a job that waits", 120)
    owner.kill()
    for database in owner.places.home.glob("daemon-*.sqlite*"):
        database.unlink()
    (owner.places.replica(waiting.id) / "job.json").unlink()
    owner.start(**QUICK)
    assert owner.serving(one).id == before.id
    assert is_answered(owner, one)
    found = json.loads(laptop.nnsight("--json", "gc", "--dry-run").stdout)
    assert found["jobs"] == [waiting.job_id]
    laptop.nnsight("down", "--all", "--wait")
    until(lambda: owner.jobs() == [], "the end of all jobs", 120)
    owner.cancel(other)


def test_jobs_are_found_without_any_state(owner, laptop, tiny):
    """Also where the whole state folder is gone: what was submitted is found by its name and comment, and cancelled."""
    owner.up("lost", model=str(tiny), mem="1G")
    until(owner.jobs, "a job", 120)
    owner.kill()
    shutil.rmtree(owner.places.home)
    owner.start(**QUICK)
    laptop.nnsight("down", "--all")
    until(lambda: owner.jobs() == [], "the end of all jobs", 120)
