"""People are told in words what their pool waits for."""

from __future__ import annotations

import pytest

from nnsight_hpc.daemon.notes import note
from nnsight_hpc.wire.errors import ErrorReport
from nnsight_hpc.wire.states import EndCause, ReplicaState
from tests.daemon.known import NOW, pool, replica

_R = ReplicaState


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (replica("a"), ""),
        (replica("a", _R.SUBMITTED, job_id=""), "replica a is being submitted"),
        (replica("a", _R.SUBMITTED, job_id="", reason="sbatch did not answer"), "sbatch did not answer"),
        (replica("a", _R.SUBMITTED), "job 1 has been submitted"),
        (replica("a", _R.PENDING), "job 1 waits"),
        (replica("a", _R.PENDING, reason="others first", begins=NOW - 1), "job 1 waits: others first"),
        (
            replica("a", _R.PENDING, reason="others first", begins=NOW + 600),
            "job 1 waits (expected to start in 10 min): others first",
        ),
        (replica("a", _R.STARTING, host="n1"), "job 1 runs on n1; its worker has not registered yet"),
        (replica("a", _R.LOADING, host="n1"), "job 1 runs on n1; its worker loads the model"),
        (
            replica("a", _R.LOADING, host="n1", loaded=3_210_000_000, total=13_500_000_000),
            "job 1 runs on n1; its worker loads the model: 3.21 GB of 13.5 GB",
        ),
        (
            replica("a", _R.ENDED, cause=EndCause.NODE_FAILED, reason="n1 is down"),
            "the next replica is being submitted; the last one ended (node failed): n1 is down",
        ),
    ],
)
def test_what_a_pool_of_one_replica_waits_for(made, words):
    """Nothing, when it serves."""
    assert note(pool(), [made], "", NOW) == words


def test_the_replica_that_is_farthest_is_waited_for():
    """A successor is not, as long as its predecessor stays."""
    coming = [replica("a", _R.PENDING), replica("b", _R.LOADING, job_id="2", host="n2")]
    assert note(pool(2, desired=2), coming, "", NOW).startswith("job 2 runs on n2")
    assert note(pool(), [replica("a"), replica("b", _R.PENDING, succeeds="a")], "", NOW) == ""


def test_pools_that_start_nothing():
    """Because they are held, taken down, or not asked for anything."""
    held = ErrorReport("ReplicaFailed", "pool p is held")
    assert note(pool(known={"held": held}), [], "", NOW) == "pool p is held"
    assert note(pool(known={"down": True}), [replica("a")], "", NOW) == "it is being taken down"
    assert note(pool("0:1"), [], "", NOW) == "no replica: one is started when a request arrives"
    assert note(pool(), [], "", NOW) == "a replica is being submitted"


def test_one_job_at_a_time_is_said_with_its_reason():
    """So that nobody is surprised when the walltime ends; and a batch system that does not answer is named."""
    words = note(pool(known={"gap": "QOSMaxJobsPerUserLimit"}), [replica("a")], "squeue did not answer", NOW)
    assert words.startswith(
        "one job at a time (QOSMaxJobsPerUserLimit; resume tries a successor again): when a replica's"
    )
    assert words.endswith("what has become of its jobs is not known just now: squeue did not answer")
    assert note(pool(succession="gap"), [replica("a")], "", NOW).startswith("one job at a time (succession is gap)")
