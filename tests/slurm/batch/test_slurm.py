"""The Slurm executor on a real Slurm, as an ordinary user on the login node."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from nnsight_hpc.slurm.batch.executor import JobState
from nnsight_hpc.wire.errors import InvalidInput, Unreachable
from nnsight_hpc.wire.places import places_at

from .conftest import wait_for

if TYPE_CHECKING:
    from tests.cluster import Cluster

    from .conftest import Bench

pytestmark = pytest.mark.cluster


def test_a_running_job_has_a_host_and_an_end(slurm: Bench) -> None:
    """The compute node, and the time at which its limit ends it, in seconds since the epoch."""
    job = slurm.start("r1", time="0:20:00")
    info = slurm.until(job, JobState.RUNNING)
    assert info.host in {"n1", "n2"}
    assert info.ends == pytest.approx(time.time() + 1200, abs=60)


def test_the_login_environment_stays_behind(slurm: Bench, cluster: Cluster) -> None:
    """No token travels into the job, and SBATCH_ variables of the login shell change nothing that the script sets."""
    job = slurm.start("r1", cpus_per_task=2)
    assert "sees None, has 2 CPUs" in slurm.log("r1")
    shown = cluster.run("login", ["scontrol", "show", "job", job]).stdout
    assert "JobName=nnsight-hpc-tiny\n" in shown
    assert "Comment=nnsight-hpc replica r1" in shown
    assert "Requeue=0" in shown
    assert "ArrayJobId" not in shown


def test_a_waiting_job_says_why_and_what_to_do(slurm: Bench) -> None:
    """Its reason in words; a drain passes it by, at once; a cancelled one has ended."""
    job = slurm.submit("r1", time="2-00:00:00")
    info = slurm.until(job, JobState.PENDING)
    deadline = time.monotonic() + 20
    while "PartitionTimeLimit" not in info.reason and time.monotonic() < deadline:
        time.sleep(0.5)
        info = slurm.info(job)
    assert info.reason.startswith("its time limit is above its partition's; it will never start so")
    began = time.monotonic()
    slurm.executor.drain(job)
    assert time.monotonic() - began < 5
    assert JobState.PENDING is slurm.info(job).state
    slurm.executor.cancel(job)
    assert slurm.until(job, JobState.ENDED).reason == "cancelled (scancel)"


def test_a_job_that_waits_for_nodes_says_so(slurm: Bench) -> None:
    """Two exclusive jobs on both nodes: the second waits for resources."""
    slurm.submit("r1", nodes=2, sbatch_args=("--exclusive",))
    slurm.until(slurm.jobs[0], JobState.RUNNING)
    slurm.submit("r2", nodes=2, sbatch_args=("--exclusive",))
    deadline = time.monotonic() + 20
    while "[Resources]" not in slurm.info(slurm.jobs[1]).reason and time.monotonic() < deadline:
        time.sleep(0.5)
    assert slurm.info(slurm.jobs[1]).reason.startswith("next in line, waits for nodes")


def test_a_drain_during_setup_starts_no_worker(slurm: Bench) -> None:
    """The script remembers a USR2 that came before the worker was there, and ends with success."""
    job = slurm.submit("r1", setup=("echo setting up", "sleep 3"))
    slurm.until(job, JobState.RUNNING)
    time.sleep(1)
    slurm.executor.drain(job)
    assert slurm.until(job, JobState.ENDED).reason == "ended with success"
    assert slurm.log("r1") == "setting up\n"


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.15, 0.3])
def test_a_drain_while_the_worker_starts_ends_the_job(slurm: Bench, delay: float) -> None:
    """At whatever moment it comes, a drain is not lost: the job ends, by itself, soon."""
    flag = slurm.places.replica("r1") / "flag"
    job = slurm.submit("r1", setup=("touch flag",))
    deadline = time.monotonic() + 20
    while not flag.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(delay)
    slurm.executor.drain(job)
    slurm.until(job, JobState.ENDED, 15)


def test_ranks_on_two_nodes_are_one_mpi_world(slurm: Bench) -> None:
    """Several tasks run under mpi4py, with the PMI that this Slurm and this MPI share."""
    job = slurm.submit("r1", "mpi", nodes=2, tasks_per_node=2, gpus_per_node=2)
    assert slurm.until(job, JobState.ENDED, 60).reason == "ended with success"
    assert slurm.log("r1").count("rank sum 6 of 4") == 4


def test_a_drain_reaches_every_rank(slurm: Bench) -> None:
    """USR2 goes to all tasks of the step, and the job waits for all."""
    job = slurm.start("r1", nodes=2)
    deadline = time.monotonic() + 20
    while slurm.log("r1").count("works in") < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    slurm.executor.drain(job)
    slurm.until(job, JobState.ENDED)
    assert slurm.log("r1").count("clean end") == 2


def test_a_job_that_is_submitted_by_hand_is_the_same(slurm: Bench, cluster: Cluster) -> None:
    """The script, put into plain sbatch by a person, starts a worker in the same folder."""
    folder = slurm.places.replica("r1")
    slurm.make_folder(folder)
    text = slurm.executor.script("r1", slurm.spec(), slurm.places)
    job = cluster.run("login", ["sbatch", "--parsable"], user="alice", input=text).stdout.strip()
    wait_for((folder / "up").exists, lambda: slurm.log("r1"))
    slurm.executor.drain(job)
    assert slurm.until(job, JobState.ENDED).reason == "ended with success"


@pytest.mark.long
def test_the_time_limit_drains_the_worker_first(slurm: Bench) -> None:
    """Slurm sends USR2 before the limit; the job ends with success, not by TIMEOUT."""
    job = slurm.start("r1", time="2")
    assert slurm.until(job, JobState.ENDED, 150).reason == "ended with success"
    assert "clean end" in slurm.log("r1")


def test_a_job_that_slurm_does_not_know_is_gone_only_when_asked_twice(slurm: Bench) -> None:
    """One answer without it is not believed; two and scontrol's word are. Known jobs in the same call are unaffected."""
    job = slurm.start("r1")
    first = slurm.executor.query(["999999", job])
    assert [first[each].state for each in ("999999", job)] == [JobState.UNKNOWN, JobState.RUNNING]
    second = slurm.executor.query(["999999", job])
    assert [second[each].state for each in ("999999", job)] == [JobState.ENDED, JobState.RUNNING]


@pytest.mark.parametrize(
    ("options", "words", "check"),
    [
        ({"partition": "nope"}, "Invalid partition name specified", "sinfo -s"),
        ({"constraint": "nope"}, "Invalid feature specification", "sinfo"),
        ({"gres": "gpu:99"}, "Requested node configuration is not available", "sinfo"),
        ({"gres": "tpu:1"}, "Invalid generic resource (gres) specification", "sinfo"),
        ({"reservation": "nope"}, "Requested reservation is invalid", "scontrol show reservation"),
        ({"mem": "999T"}, "Memory specification can not be satisfied", "sinfo"),
        ({"sbatch_args": ("--bogus=1",)}, "unrecognized option '--bogus=1'", "sbatch_args"),
        ({"sbatch_args": ("--begin=never",)}, "Invalid --begin specification", "sbatch_args"),
    ],
)
def test_a_refused_job_is_told_in_sbatchs_words(
    slurm: Bench, options: dict[str, object], words: str, check: str
) -> None:
    """With what to look at; and no script is left that was never a job's."""
    with pytest.raises(InvalidInput) as caught:
        slurm.submit("r1", **options)
    assert words in caught.value.why
    assert check in caught.value.next
    assert list(slurm.places.replica("r1").iterdir()) == []


@pytest.mark.parametrize(
    "value",
    [
        "a 'b' \"c\" #d $(id) --array=1-9",
        "\\' --array=1-9 '",
        "\\\\' --array=1-9 '",
        '\\" --array=1-9 "',
        "'\" --array=1-9 \"'",
        "back\\slash\\",
    ],
)
def test_values_with_quotes_arrive_as_they_are(slurm: Bench, cluster: Cluster, value: str) -> None:
    """What a person writes is one value of one option to Slurm, whatever is in it."""
    job = slurm.submit("r1", sbatch_args=("--mail-type=TIME_LIMIT", f"--mail-user={value}"))
    shown = cluster.run("login", ["scontrol", "show", "job", job]).stdout
    assert f"MailUser={value} MailType=TIME_LIMIT\n" in shown
    assert "ArrayJobId" not in shown


@pytest.mark.slow
def test_a_controller_that_is_down_makes_nothing_certain(slurm: Bench, cluster: Cluster) -> None:
    """While it does not answer, a running job is UNKNOWN, never ended, and a new one cannot be submitted."""
    job = slurm.start("r1")
    cluster.run("login", ["scontrol", "shutdown", "slurmctld"], user="root")  # it saves its state
    try:
        assert JobState.UNKNOWN is slurm.info(job).state
        with pytest.raises(Unreachable):
            slurm.submit("r2")
    finally:
        cluster.start_service("login", "slurmctld")
    slurm.until(job, JobState.RUNNING, 60)


def test_a_folder_that_slurm_would_rewrite_is_refused(slurm: Bench) -> None:
    """Slurm replaces percent signs and backslashes in the name of the log."""
    for name in ("a%jb", "a\\b"):
        with pytest.raises(InvalidInput, match="home folder"):
            slurm.executor.script("r1", slurm.spec(), places_at(slurm.places.home / name))
