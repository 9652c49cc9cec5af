"""The contract of executors, on real processes and on a real Slurm."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from nnsight_hpc.slurm.batch.embedded import EmbeddedExecutor
from nnsight_hpc.slurm.batch.executor import JobState, executor
from nnsight_hpc.slurm.batch.log_lines import of_rank
from nnsight_hpc.wire.errors import InvalidInput, ReplicaFailed
from nnsight_hpc.wire.places import places_at
from nnsight_hpc.wire.pools import PoolSpec
from nnsight_hpc.wire.states import EndCause

from .conftest import wait_for

if TYPE_CHECKING:
    from .conftest import Bench


def test_a_job_runs_in_its_folder_and_ends_cleanly_when_drained(bench: Bench) -> None:
    """USR2 reaches the worker, and the job lasts until the worker has finished what it held."""
    job = bench.start("r1")
    assert bench.until(job, JobState.RUNNING).host
    bench.executor.drain(job)
    info = bench.until(job, JobState.ENDED)
    assert (info.reason, info.cause) == ("ended with success", EndCause.DRAINED)
    assert bench.log("r1").splitlines()[-2:] == ["got USR2", "clean end"]
    assert bench.end("r1")["cause"] == "DRAINED"
    assert f"works in {bench.places.replica('r1')}" in bench.log("r1")


def test_a_job_says_with_which_exit_code_it_failed(bench: Bench) -> None:
    """The job is known to have failed; its script has written down how."""
    assert EndCause.CRASHED is bench.until(bench.submit("r1", "fail"), JobState.ENDED).cause
    assert "exit code 7" in bench.end("r1")["detail"]


def test_a_worker_that_is_killed_is_told_apart(bench: Bench) -> None:
    """A worker that died of SIGKILL (the kernel's out-of-memory killer, say) is not an ordinary failure."""
    assert EndCause.CRASHED is bench.until(bench.submit("r1", "crash"), JobState.ENDED).cause
    assert "killed" in bench.end("r1")["detail"].lower()


def test_a_survey_finds_the_jobs_of_a_home(bench: Bench) -> None:
    """Also those that nobody asks for, while they have not ended; not those of another home."""
    before = time.time()
    job = bench.start("r1")
    found = bench.executor.survey([], bench.places)
    assert ({}, {"r1": job}, "") == (found.jobs, found.ours, found.doubt)
    assert bench.executor.survey([], places_at(bench.places.home / "other")).ours == {}
    assert before - 1 < bench.until(job, JobState.RUNNING).started < time.time() + 1  # Slurm cuts seconds off
    bench.executor.cancel(job)
    bench.until(job, JobState.ENDED)
    assert bench.executor.survey([], bench.places).ours == {}


def test_an_estimate_starts_nothing(bench: Bench) -> None:
    """Of an empty cluster, or this machine: about now."""
    start, words = bench.executor.estimate("r1", bench.spec(), bench.places)
    assert abs(start - time.time()) < 120, words
    assert bench.executor.survey([], bench.places).ours == {}


def test_a_job_that_runs_has_no_position(bench: Bench) -> None:
    """Only one that waits for its turn has."""
    assert bench.executor.position(bench.start("r1")) is None


def test_cancel_lets_the_worker_clean_up(bench: Bench) -> None:
    """SIGTERM comes first, and the caller does not wait for the end."""
    job = bench.start("r1")
    bench.executor.cancel(job)
    assert EndCause.CANCELLED is bench.until(job, JobState.ENDED).cause
    assert "terminated" in bench.log("r1")
    assert "got USR2" not in bench.log("r1")


def test_cancel_ends_a_worker_that_ignores_sigterm(bench: Bench) -> None:
    """SIGKILL follows after the grace; asking again for the end of an ended job has no effect."""
    bench.executor._grace = 2.0  # of the embedded one; Slurm has its own
    job = bench.start("r1", "stubborn")
    bench.executor.cancel(job)
    bench.until(job, JobState.ENDED)
    bench.executor.cancel(job)
    bench.executor.drain(job)


def test_a_folder_that_is_not_there_is_an_error_in_words(bench: Bench) -> None:
    """Nothing is started that could not write its log."""
    with pytest.raises(ReplicaFailed) as caught:
        bench.executor.submit("r1", bench.spec(), bench.places)
    assert str(bench.places.replica("r1")) in caught.value.where


def test_the_script_is_kept_and_is_the_very_text(bench: Bench) -> None:
    """What `script` shows is what has been submitted; it lies in the replica's folder, and nothing pickled does."""
    job = bench.start("r1")
    folder = bench.places.replica("r1")
    assert bench.executor.script("r1", bench.spec(), bench.places) == (folder / "script").read_text()
    assert {"log", "script", "up"} == {path.name for path in folder.iterdir()}
    bench.executor.cancel(job)


def test_setup_comes_before_the_worker(bench: Bench) -> None:
    """The pool's setup lines run in the worker's own environment, in order."""
    job = bench.submit("r1", "fail", setup=("X=1", 'echo "setup $((X + 1))"'))
    bench.until(job, JobState.ENDED)
    assert bench.log("r1").splitlines()[0] == "setup 2"


def test_a_hostile_replica_or_pool_name_is_refused(bench: Bench) -> None:
    """Names that would be paths, options or lines are refused before anything is started."""
    for name in ("../x", "-x", "a b", "a\nb", "$(id)", ""):
        with pytest.raises(InvalidInput):
            bench.executor.script(name, bench.spec(), bench.places)


# Without Slurm


def test_who_cancels_does_not_wait_for_the_end(local: Bench) -> None:
    """The worker has its grace meanwhile, of a minute here."""
    job = local.start("r1", "stubborn")
    local.executor.cancel(job)
    assert local.info(job).state is JobState.RUNNING
    script = psutil.Process(int(job.split(":")[0]))
    for process in [*script.children(recursive=True), script]:
        process.kill()
    local.until(job, JobState.ENDED)


def test_a_local_worker_outlives_the_daemon_that_started_it(local: Bench) -> None:
    """It runs in a session of its own, is found again by its job id, and its end is seen."""
    local.make_folder(local.places.replica("r1"))
    program = """if True:
        import json, sys
        from pathlib import Path
        from nnsight_hpc.slurm.batch.embedded import EmbeddedExecutor
        from nnsight_hpc.wire.messages import decode
        from nnsight_hpc.wire.pools import PoolSpec
        from nnsight_hpc.wire.places import places_at
        home, spec = json.loads(sys.argv[1])
        print(EmbeddedExecutor("tiny_worker").submit("r1", decode(spec.encode(), PoolSpec), places_at(Path(home))))
    """
    from nnsight_hpc.wire.messages import encode

    argument = json.dumps([str(local.places.home), encode(local.spec()).decode()])
    done = subprocess.run(
        [sys.executable, "-c", program, argument], check=True, capture_output=True, text=True, timeout=120
    )
    job = done.stdout.strip()
    local.jobs.append(job)
    pid = int(job.split(":")[0])
    assert JobState.RUNNING is local.info(job).state
    assert pid == os.getsid(pid)
    local.executor.cancel(job)
    assert "another daemon" in local.until(job, JobState.ENDED).reason


def test_another_process_with_the_same_pid_is_left_alone(local: Bench) -> None:
    """A pid that belongs to another process by now means that the job has ended; nobody signals that process."""
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as stranger:
        job = f"{stranger.pid}:{psutil.Process(stranger.pid).create_time() - 60:.2f}"
        assert JobState.ENDED is local.info(job).state
        local.executor.drain(job)
        local.executor.cancel(job)
        time.sleep(0.2)
        assert stranger.poll() is None
        stranger.kill()


def test_a_dead_worker_that_nobody_has_reaped_has_ended(local: Bench) -> None:
    """Also for an executor that did not start it: a zombie runs no more. Any survey of the one that did reaps it."""
    job = local.submit("r1", "fail")
    pid = int(job.split(":")[0])
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert JobState.ENDED is EmbeddedExecutor().survey([job], local.places).jobs[job].state
    assert psutil.pid_exists(pid)
    local.executor.survey([], local.places)
    assert not psutil.pid_exists(pid)
    assert local.info(job).reason == "failed with exit code 7"


def test_cancel_takes_what_the_worker_left_behind(local: Bench) -> None:
    """Children of a cancelled worker that ignore SIGTERM end with it."""
    marker = local.places.home / "child"
    child = f"trap '' TERM; echo $BASHPID > {shlex.quote(str(marker))}; sleep 60; sleep 60"
    job = local.start("r1", setup=(f"({child}) &",))
    wait_for(lambda: marker.exists() and marker.read_text().endswith("\n"), lambda: local.log("r1"))
    pid = int(marker.read_text())
    local.executor.cancel(job)
    local.until(job, JobState.ENDED)
    deadline = time.monotonic() + 120
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not psutil.pid_exists(pid)


def test_several_nodes_need_a_cluster(local: Bench) -> None:
    """Without Slurm there is one machine; more are refused, not ignored."""
    with pytest.raises(InvalidInput, match="asks for 2 nodes"):
        local.executor.script("r1", local.spec(nodes=2, tp=2), local.places)


def test_a_worker_that_cannot_be_started_is_an_error_in_words(local: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """No bash on PATH: the error names the script."""
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ReplicaFailed, match="could not be started"):
        local.submit("r1")


@pytest.mark.parametrize("job", ["", "12", "x:y", "1;2"])
def test_what_is_no_local_job_is_refused(local: Bench, job: str) -> None:
    """A job id of another executor is a mistake, not a process."""
    with pytest.raises(InvalidInput, match="not a local job"):
        local.info(job)


def test_executors_are_found_by_name() -> None:
    """By the two names that exist; another is refused."""
    assert [executor(name).name for name in ("embedded", "slurm")] == ["embedded", "slurm"]
    with pytest.raises(InvalidInput, match="pbs"):
        executor("pbs")


def test_nothing_here_loads_torch() -> None:
    """The daemon imports this package: it stays small."""
    program = (
        "import nnsight_hpc.slurm.batch.slurm, nnsight_hpc.slurm.batch.embedded, sys; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=120)
    assert done.stdout == "False\n"


def test_a_worker_whose_script_was_killed_is_found_and_ended(local: Bench) -> None:
    """It is a job of its own then, and no orphan."""
    job = local.start("r1")
    os.kill(int(job.split(":")[0]), signal.SIGKILL)
    assert local.until(job, JobState.ENDED).reason == "ended by signal SIGKILL"
    orphan = local.executor.survey([job], local.places).ours["r1"]
    assert orphan != job
    local.executor.cancel(orphan)
    local.until(orphan, JobState.ENDED)
    assert local.executor.survey([], local.places).ours == {}


def test_a_script_that_is_run_by_hand_is_a_job_like_others(local: Bench) -> None:
    """It is found, and ended without what it was started from: here, a shell that is not led by it."""
    folder = local.places.replica("r1")
    local.make_folder(folder)
    (folder / "script").write_text(local.executor.script("r1", local.spec(), local.places))
    shell = ["bash", "-c", "bash script; echo lives on"]
    with subprocess.Popen(shell, cwd=folder, stdout=subprocess.PIPE, text=True, start_new_session=True) as by_hand:
        wait_for((folder / "up").exists, lambda: str(local.executor.survey([], local.places)))
        job = local.executor.survey([], local.places).ours["r1"]
        assert int(job.split(":")[0]) != by_hand.pid
        local.executor.cancel(job)
        assert "lives on" in by_hand.stdout.read()
    assert local.end("r1")["cause"] == "CANCELLED"


def test_the_log_grows_and_is_never_cut(local: Bench) -> None:
    """A replica's log keeps what was there before the worker began."""
    local.make_folder(local.places.replica("r1"))
    (local.places.replica("r1") / "log").write_text("before\n")
    local.make_folder = Path
    local.until(local.submit("r1", "fail"), JobState.ENDED)
    assert local.log("r1").splitlines()[0] == "before"


def test_ranks_without_mpirun_are_refused_with_what_to_do(local: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the pool's setup may bring it; a single process needs none."""
    monkeypatch.setenv("PATH", str(local.places.home))
    with pytest.raises(InvalidInput, match="no mpirun") as caught:
        local.executor.script("r1", PoolSpec(name="tiny", model="none", tp=2), local.places)
    assert "openmpi" in caught.value.next
    assert "mpirun $label -n 2" in local.executor.script("r1", local.spec(tp=2), local.places)
    assert "mpirun $label" not in local.executor.script("r1", PoolSpec(name="tiny", model="none"), local.places)


def test_ranks_on_this_machine_are_one_mpi_world(local: Bench) -> None:
    """Below a real mpirun, whatever the folder is called; the script says how they ended."""
    job = local.submit("r1", "mpi", tp=3)
    assert local.until(job, JobState.ENDED).reason == "ended with success"
    assert [of_rank(local.log("r1"), rank).count("rank sum 3 of 3") for rank in range(4)] == [1, 1, 1, 0]
    assert local.end("r1")["cause"] == "DRAINED"


def test_cancel_ends_ranks_that_ignore_sigterm(local: Bench) -> None:
    """The launcher and its ranks are gone after the grace, though each rank has a process group of its own."""
    local.executor._grace = 10.0  # that of a real one: the launcher has its own, and then clears up
    job = local.start("r1", "stubborn", tp=2)
    leader = int(job.split(":")[0])
    local.executor.cancel(job)
    local.until(job, JobState.ENDED)
    deadline = time.monotonic() + 120
    while (left := [pid for pid in psutil.pids() if _session(pid) == leader]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return 0
