"""What the script says of the end of a worker, from what srun, Slurm and mpirun print; and that the first reason counts."""

from __future__ import annotations

import pytest

from nnsight_hpc.slurm.worker import epilogue
from nnsight_hpc.slurm.worker.ending import record_of, write, written
from nnsight_hpc.slurm.worker.team import threads
from nnsight_hpc.wire.errors import ReplicaFailed
from nnsight_hpc.wire.places import places_at
from nnsight_hpc.wire.states import EndCause
from nnsight_hpc.wire.workers import EndRecord

KILLED = """\
2026-11-22 13:43:38,128 INFO nnsight_hpc.slurm.worker.loop: r-abc (run) done in 0.1 s, 9 bytes
srun: error: n2: task 2: Killed
srun: Terminating StepId=1.0
slurmstepd: error: *** STEP 1.0 ON n1 CANCELLED AT 2026-11-22T13:43:40 ***
srun: error: n1: tasks 0-1: Terminated
srun: Force Terminated StepId=1.0
"""
MPIRUN = """\
--------------------------------------------------------------------------
mpirun noticed that process rank 1 with PID 0 on node vm exited on signal 9 (Killed).
--------------------------------------------------------------------------
"""
MPIRUN_CODE = """\
mpirun detected that one or more processes exited with non-zero status, thus causing
the job to be terminated. The first process to do so was:

  Process name: [[23451,1],1]
  Exit code:    5
"""
MEMORY = "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=9.0\nsrun: error: n1: task 0: Out Of Memory\n"
NODE = "srun: error: Node failure on n2\nsrun: error: n2: task 2: Killed\n"
NO_PMI = (
    "[n1:123] OPAL ERROR: Unreachable in file pmix3x_client.c\nsrun: error: n1: tasks 0-1: Exited with exit code 1\n"
)


LIMIT = "0: slurmstepd-n1: error: *** STEP 8.0 ON n1 CANCELLED AT 2026-11-22T13:50:01 DUE TO TIME LIMIT ***\n"
PREEMPTED = "slurmstepd: error: *** JOB 8 ON n1 CANCELLED AT 2026-11-22T13:50:01 DUE TO PREEMPTION ***\n" + KILLED
SCANCEL = "slurmstepd: error: *** JOB 8 ON n1 CANCELLED AT 2026-11-22T13:50:01 ***\n" + KILLED


@pytest.fixture
def places(tmp_path):
    """The folder of a replica whose ranks have met."""
    found = places_at(tmp_path)
    found.replica("w1").mkdir(parents=True)
    (found.replica("w1") / "ranks.json").write_text('["n1", "n1", "n2"]')
    return found


def record(places, log, code=1, told="", ranks=3):
    (places.replica("w1") / "log").write_text(log)
    return epilogue.record("w1", places, ranks, code, told)


@pytest.mark.parametrize(
    ("log", "code", "said"),
    [
        (KILLED, 137, "rank 2 on n2 was killed"),
        (MPIRUN, 137, "rank 1 on vm was killed"),
        (MPIRUN_CODE, 5, "rank 1 ended: exit code: 5"),
        ("something else\n", 1, "the launcher of the ranks failed with exit code 1"),
    ],
)
def test_the_rank_that_ended_first_is_named(places, log, code, said):
    """With its node, where the launcher says it; what it did to the others comes later in the log."""
    found = record(places, log, code)
    assert found.cause == "CRASHED"
    assert found.detail.startswith(said)


@pytest.mark.parametrize(
    ("log", "code", "said"),
    [
        ("srun: error: n1: task 0: Killed\n", 137, "the worker on n1 was killed"),
        ("", 137, "the worker was killed"),
        (
            "srun: error: n1: task 0: Segmentation fault (core dumped)\n",
            139,
            "the worker on n1 ended: segmentation fault",
        ),
        ("", 139, "the worker failed with exit code 139, as after signal SIGSEGV"),
        (
            "ImportError: no\nsrun: error: n1: task 0: Exited with exit code 1\n",
            1,
            "the worker on n1 ended: exited with",
        ),
    ],
)
def test_a_worker_alone_is_no_rank(places, log, code, said):
    """With a launcher or without, a signal and an exit code are told apart, and no MPI is spoken of."""
    (places.replica("w1") / "ranks.json").unlink()
    found = record(places, log, code, ranks=1)
    assert found.cause == "CRASHED"
    assert found.detail.startswith(said)
    assert "mpi" not in found.detail


@pytest.mark.parametrize(
    ("log", "cause", "said"),
    [
        (NODE, "NODE_FAILED", "a node of the job failed"),
        (LIMIT + KILLED, "WALLTIME", "the job reached its time limit"),
        (PREEMPTED, "PREEMPTED", "the job was preempted by another one"),
    ],
)
@pytest.mark.parametrize("code", [0, 1])
def test_what_slurm_did_is_its_cause(places, log, cause, said, code):
    """Slurm's own words count more than what they did to the ranks, and than srun's exit code, which may be 0."""
    found = record(places, log, code)
    assert (found.cause, found.detail) == (cause, said)


def test_memory_that_ran_out_is_the_cause(places):
    """The rank that Slurm has ended for its memory is named."""
    found = record(places, MEMORY)
    assert found.cause == "OUT_OF_MEMORY"
    assert found.detail.startswith("rank 0 on n1 ran out of memory")


@pytest.mark.parametrize(("log", "cause"), [(LIMIT, "WALLTIME"), (PREEMPTED, "PREEMPTED"), (SCANCEL, "CANCELLED")])
@pytest.mark.parametrize("said", [True, False])
def test_a_worker_that_was_told_to_end_learns_why(places, log, cause, said):
    """SIGTERM says nothing of its reason, and what the worker has written of it is made more exact."""
    if said:
        write(EndRecord(replica="w1", cause=EndCause.CANCELLED), places)
    (places.replica("w1") / "log").write_text(log)
    epilogue.main(["--home", str(places.home), "--replica", "w1", "--code", "143", "--told", "cancelled"])
    assert written("w1", places).cause == cause


def test_ranks_that_never_met_point_at_the_launcher(places):
    """Where MPI_Init ends the processes, the message says what to look at."""
    (places.replica("w1") / "ranks.json").unlink()
    detail = record(places, NO_PMI).detail
    assert detail.startswith("the ranks did not come together: ranks 0-1 on n1 ended: exited with exit code 1")
    assert "srun --mpi=list" in detail


@pytest.mark.parametrize(
    ("log", "code", "told", "cause"),
    [
        ("", 0, "", "DRAINED"),
        ("", 0, "drained", "DRAINED"),
        (KILLED, 137, "cancelled", "CANCELLED"),
        ("", 143, "cancelled", "CANCELLED"),
    ],
)
def test_what_was_wanted_is_no_failure(places, log, code, told, cause):
    """A job that was cancelled says so, whatever that did to its ranks."""
    found = record(places, log, code, told)
    assert (found.cause, found.detail) == (cause, "")


def test_the_first_reason_counts(places):
    """What a rank has written down stays, and no file lies beside it."""
    first, second = (record_of("w1", ReplicaFailed(text)) for text in ("first", "second"))
    write(first, places)
    write(second, places)
    assert first == written("w1", places)
    epilogue.main(["--home", str(places.home), "--replica", "w1", "--code", "1", "--told", "cancelled"])
    assert first == written("w1", places)
    assert {"end.json", "ranks.json"} == {path.name for path in places.replica("w1").iterdir()}


@pytest.mark.parametrize(
    "words",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory",
        "MemoryError: ",
        "there is not the memory for this rank's part of the model",
    ],
)
def test_a_model_that_does_not_fit_is_out_of_memory(words):
    """Whoever says that there is no memory, the record's cause says so too."""
    assert record_of("w1", ReplicaFailed("the model was loaded, but its first forward failed", why=words)).cause == (
        "OUT_OF_MEMORY"
    )


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 4),
        ({"SLURM_CPUS_ON_NODE": "8"}, 4),
        ({"SLURM_CPUS_PER_TASK": "6", "SLURM_CPUS_ON_NODE": "64"}, 6),
        ({"SLURM_CPUS_ON_NODE": "1"}, 1),
    ],
)
def test_ranks_of_a_node_share_its_cores(environment, expected):
    """Two ranks of a node of 8 cores have 4 each, unless Slurm says how many a rank has."""
    assert expected == threads(environment, cpus=8, ranks=2)
