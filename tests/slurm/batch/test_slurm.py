"""The Slurm executor on a real Slurm, as an ordinary user on the login node."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from nnsight_hpc.slurm.batch.executor import JobState
from nnsight_hpc.slurm.batch.log_lines import of_rank
from nnsight_hpc.slurm.batch.marks import mark
from nnsight_hpc.wire.errors import InvalidInput, Unreachable
from nnsight_hpc.wire.places import places_at
from nnsight_hpc.wire.states import EndCause

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
    assert info.ends == pytest.approx(info.started + 1200, abs=1)


def test_the_login_environment_stays_behind(slurm: Bench, cluster: Cluster) -> None:
    """No token travels into the job, and SBATCH_ variables of the login shell change nothing that the script sets."""
    job = slurm.start("r1", cpus_per_task=2)
    wait_for(lambda: "sees None, has 2 CPUs" in slurm.log("r1"), lambda: slurm.log("r1"))
    shown = cluster.run("login", ["scontrol", "show", "job", job]).stdout
    assert "JobName=nnsight-hpc-tiny\n" in shown
    assert f"Comment={mark('r1', slurm.places)}" in shown
    assert "Requeue=0" in shown
    assert "ArrayJobId" not in shown


def test_a_waiting_job_says_why_and_what_to_do(slurm: Bench) -> None:
    """Its reason in words; a drain passes it by, at once; a cancelled one has ended."""
    job = slurm.submit("r1", time="2-00:00:00")
    why = "its time limit is above its partition's; it will never start so"
    wait_for(lambda: slurm.info(job).reason.startswith(why), lambda: str(slurm.info(job)))
    slurm.executor.drain(job)
    slurm.until(job, JobState.PENDING)
    slurm.executor.cancel(job)
    assert slurm.until(job, JobState.ENDED).reason == "cancelled (scancel)"


def test_a_job_that_waits_for_nodes_says_so(slurm: Bench) -> None:
    """Two exclusive jobs on both nodes: the second waits for resources."""
    slurm.submit("r1", nodes=2, tp=2, sbatch_args=("--exclusive",))
    slurm.until(slurm.jobs[0], JobState.RUNNING)
    slurm.submit("r2", nodes=2, tp=2, sbatch_args=("--exclusive",))
    why = "next in line, waits for nodes"
    wait_for(lambda: slurm.info(slurm.jobs[1]).reason.startswith(why), lambda: str(slurm.info(slurm.jobs[1])))
    slurm.submit("r3", nodes=2, tp=2, sbatch_args=("--exclusive",))
    wait_for(lambda: slurm.executor.position(slurm.jobs[2]) == 2, lambda: str(slurm.info(slurm.jobs[2])))
    assert [slurm.executor.position(job) for job in slurm.jobs] == [None, 1, 2]
    start, how = slurm.estimate("r4", nodes=2, tp=2)
    assert start > time.time() + 60
    assert "in partition gpu" in how


def test_a_drain_during_setup_starts_no_worker(slurm: Bench) -> None:
    """The script remembers a USR2 that came before the worker was there, and ends with success."""
    job = slurm.submit("r1", setup=("echo setting up", "until [[ $told ]]; do sleep 0.1; done"))
    wait_for(lambda: "setting up" in slurm.log("r1"), lambda: str(slurm.info(job)))
    slurm.executor.drain(job)
    assert slurm.until(job, JobState.ENDED).reason == "ended with success"
    assert slurm.log("r1") == "setting up\n"


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.15, 0.3])
def test_a_drain_while_the_worker_starts_ends_the_job(slurm: Bench, delay: float) -> None:
    """At whatever moment it comes, a drain is not lost: the job ends, by itself, soon."""
    flag = slurm.places.replica("r1") / "flag"
    job = slurm.submit("r1", setup=("touch flag",))
    deadline = time.monotonic() + 120
    while not flag.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(delay)
    slurm.executor.drain(job)
    slurm.until(job, JobState.ENDED)


def test_ranks_on_two_nodes_are_one_mpi_world(slurm: Bench) -> None:
    """Several tasks run under mpi4py, with the PMI that this Slurm and this MPI share; srun says which line is whose."""
    job = slurm.submit("r1", "mpi", nodes=2, tp=3, gpus_per_node=2)
    assert slurm.until(job, JobState.ENDED).reason == "ended with success"
    lines = [of_rank(slurm.log("r1"), rank).splitlines() for rank in range(4)]
    assert [each.count("rank sum 3 of 3") for each in lines] == [1, 1, 1, 0]
    assert all(each[0].startswith("works in") for each in lines[:3])


def test_a_drain_reaches_every_rank(slurm: Bench) -> None:
    """USR2 goes to all tasks of the step, and the job waits for all."""
    job = slurm.start("r1", nodes=2, tp=2)
    wait_for(lambda: slurm.log("r1").count("works in") == 2, lambda: slurm.log("r1"))
    slurm.executor.drain(job)
    slurm.until(job, JobState.ENDED)
    assert slurm.log("r1").count("clean end") == 2


def test_several_ranks_that_are_cancelled_say_so(slurm: Bench) -> None:
    """The script has outlived them, knows that it was told to end, and does not take it for a rank's failure."""
    job = slurm.start("r1", nodes=2, tp=3)
    slurm.executor.cancel(job)
    slurm.until(job, JobState.ENDED)
    assert slurm.end("r1")["cause"] == "CANCELLED"


def submit_by_hand(slurm: Bench, cluster: Cluster, *options: str, **spec: object) -> str:
    slurm.make_folder(slurm.places.replica("r1"))
    text = slurm.executor.script("r1", slurm.spec(**spec), slurm.places)
    return cluster.run("login", ["sbatch", "--parsable", *options], user="alice", input=text).stdout.strip()


def test_a_job_that_is_submitted_by_hand_is_the_same(slurm: Bench, cluster: Cluster) -> None:
    """The script, put into plain sbatch by a person, starts a worker in the same folder."""
    folder = slurm.places.replica("r1")
    job = submit_by_hand(slurm, cluster)
    wait_for((folder / "up").exists, lambda: slurm.log("r1"))
    slurm.executor.drain(job)
    assert slurm.until(job, JobState.ENDED).reason == "ended with success"


def test_a_job_drains_before_the_end_that_slurm_tells(slurm: Bench, cluster: Cluster) -> None:
    """Newer versions say it in a variable, which the script believes more than its own clock."""
    begun = int(time.time())
    ends = begun + 12
    job = submit_by_hand(slurm, cluster, f"--export=SLURM_JOB_END_TIME={ends}", time="1")
    assert slurm.until(job, JobState.ENDED).reason == "ended with success"
    assert ends - 7 <= slurm.end("r1")["time"] < begun + 50  # by its own clock it drains after 53 s at the earliest


@pytest.mark.long
def test_a_job_drains_before_its_time_limit(slurm: Bench) -> None:
    """The script's own timer is exact: it ends with success, 7 s before the minute that it has, and not much earlier."""
    job = slurm.start("r1", time="1")
    started = slurm.info(job).started
    info = slurm.until(job, JobState.ENDED)
    assert (info.reason, info.cause) == ("ended with success", EndCause.DRAINED)
    assert 45 <= slurm.end("r1")["time"] - started <= 60
    assert "clean end" in slurm.log("r1")


@pytest.mark.long
def test_a_job_that_does_not_drain_reaches_its_time_limit(slurm: Bench) -> None:
    """Which is told apart from a failure."""
    job = slurm.start("r1", "deaf", time="1")
    info = slurm.until(job, JobState.ENDED, 180)
    assert (info.reason, info.cause) == ("reached its time limit", EndCause.WALLTIME)
    assert "got USR2" in slurm.log("r1")


def test_a_job_that_slurm_does_not_know_is_gone_only_when_it_was_looked_for(slurm: Bench) -> None:
    """Two answers without it are not believed; scontrol's word is. Known jobs are seen every other turn at least."""
    job = slurm.start("r1")
    turns = [slurm.executor.survey(["999999", job], slurm.places).jobs for _ in range(4)]
    unknown, running, ended = JobState.UNKNOWN, JobState.RUNNING, JobState.ENDED
    assert [unknown, unknown, ended, ended] == [turn["999999"].state for turn in turns]
    assert [running, running, unknown, running] == [turn[job].state for turn in turns]


def test_a_job_that_begins_later(slurm: Bench) -> None:
    """It waits, says until when, and starts then."""
    now, later = time.time() + 8, time.time() + 3600
    soon, waiting = (submit_at(slurm, replica, begin) for replica, begin in (("r1", now), ("r2", later)))
    assert slurm.until(waiting, JobState.PENDING).begins == pytest.approx(later, abs=60)
    assert slurm.executor.position(waiting) is None
    assert slurm.until(soon, JobState.RUNNING).started >= now - 2


def submit_at(slurm: Bench, replica: str, begin: float) -> str:
    slurm.make_folder(slurm.places.replica(replica))
    job = slurm.executor.submit(replica, slurm.spec(), slurm.places, begin=begin)
    slurm.jobs.append(job)
    return job


def test_a_preempted_job_is_told_apart(slurm: Bench) -> None:
    """It is ended by a job of a higher partition, and is not a failure of its own."""
    job = slurm.start("r1", partition="scavenge", nodes=2, tp=2, sbatch_args=("--exclusive",))
    slurm.submit("r2", partition="gpu", nodes=2, tp=2, sbatch_args=("--exclusive",))
    info = slurm.until(job, JobState.ENDED)
    assert (info.reason, info.cause) == ("preempted by another job", EndCause.PREEMPTED)


@pytest.mark.parametrize(
    ("options", "why", "allowed"),
    [
        ({"partition": "nope"}, "there is no partition nope", "use one of gpu, scavenge"),
        ({"time": "2-0"}, "partition gpu has at most 1-00:00:00", "ask for what there is"),
        ({"nodes": 3, "tp": 3}, "partition gpu has 2 nodes", "ask for what there is"),
        ({"gres": "gpu:h100:1"}, "partition gpu has 2 gpu", "ask for what there is"),
        ({"gpus_per_node": 3}, "partition gpu has 2 gpu", "ask for what there is"),
        ({"mem": "64G"}, "partition gpu has 8000M", "ask for what there is"),
        ({"constraint": "a100"}, "no node has the feature a100", "leave the constraint out"),
    ],
)
def test_what_can_never_run_is_refused_with_what_is_allowed(
    slurm: Bench, options: dict[str, object], why: str, allowed: str
) -> None:
    """Before anything is submitted, from this cluster's own sinfo."""
    slurm.executor.check(slurm.spec(nodes=2, tp=2, gpus_per_node=2))
    with pytest.raises(InvalidInput) as caught:
        slurm.executor.check(slurm.spec(**options))
    assert why in str(caught.value)
    assert allowed in caught.value.next


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
        ({"sbatch_args": ("--deadline=never",)}, "Invalid --deadline specification", "sbatch_args"),
    ],
)
def test_a_refused_job_is_told_in_sbatchs_words(
    slurm: Bench, options: dict[str, object], words: str, check: str
) -> None:
    """With what to look at, by an estimate as well; and no script is left that was never a job's."""
    for attempt in (slurm.submit, slurm.estimate):
        with pytest.raises(InvalidInput) as caught:
            attempt("r1", **options)
        assert words in caught.value.why or attempt == slurm.estimate  # it has fewer words
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
    wait_for(lambda: not cluster.runs_service("login", "slurmctld"), lambda: cluster.log("login", "slurmctld"))
    try:
        assert JobState.UNKNOWN is slurm.info(job).state
        with pytest.raises(Unreachable):
            slurm.submit("r2")
    finally:
        cluster.start_service("login", "slurmctld")
    slurm.until(job, JobState.RUNNING)


def test_a_folder_that_slurm_would_rewrite_is_refused(slurm: Bench) -> None:
    """Slurm replaces percent signs and backslashes in the name of the log."""
    for name in ("a%jb", "a\\b"):
        with pytest.raises(InvalidInput, match="home folder"):
            slurm.executor.script("r1", slurm.spec(), places_at(slurm.places.home / name))
