"""How workers begin and end: refusals, load failures, signals, draining."""

from __future__ import annotations

import signal
import subprocess
import time

import msgspec
import pytest

from nnsight_hpc.execution.values import unpack_values
from nnsight_hpc.wire.messages import Orders
from tests.slurm.worker.graphs import capture_frame
from tests.slurm.worker.stand_in import wait_for

LONG = 2500  # forwards: they take longer than a worker may take to end


def test_usr2_ends_an_idle_worker_within_a_second(bench):
    """SIGUSR2 cuts the long poll: the worker ends with code 0 and says that it drained, in a file and to the daemon."""
    worker = bench.ready_worker()
    time.sleep(0.5)  # it is in its poll
    begun = time.monotonic()
    worker.send_signal(signal.SIGUSR2)
    assert worker.wait(10) == 0
    assert time.monotonic() - begun < 1.0
    assert bench.end_record().cause == "drained"
    assert [record.cause for record in bench.daemon.ends] == ["drained"]


def test_usr2_lets_a_running_request_finish(bench):
    """A request that runs when SIGUSR2 comes is finished and delivered; the one behind it is not begun."""
    worker = bench.ready_worker()
    first = bench.daemon.submit(capture_frame(forwards=300))
    wait_for(lambda: first in bench.daemon.started, "the start")
    second = bench.daemon.submit(capture_frame())
    worker.send_signal(signal.SIGUSR2)
    assert worker.wait(30) == 0
    assert "hidden" in unpack_values(bench.daemon.result(first))
    assert bench.daemon.outcome(first).error is None
    assert not bench.daemon.outcomes[second]
    assert "DRAINING" in [report.state for report in bench.daemon.reports]
    assert bench.end_record().cause == "drained"


def test_term_gives_up_what_runs(bench):
    """SIGTERM ends a running request at a module, without an outcome, so that another worker gets it."""
    worker = bench.ready_worker()
    request = bench.daemon.submit(capture_frame(forwards=LONG))
    wait_for(lambda: request in bench.daemon.started, "the start")
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(10) == 0
    assert not bench.daemon.outcomes[request]
    assert bench.end_record().cause == "cancelled"


def test_a_worker_without_job_json_asks_the_daemon_and_obeys_it(bench):
    """Submitted by hand, a worker learns its pool from the welcome; the daemon's order to drain does what SIGUSR2 does."""
    worker = bench.worker("by-hand", job=False)
    bench.daemon.wait_state("READY")
    assert [hello.replica for hello in bench.daemon.hellos] == ["by-hand"]
    request = bench.daemon.submit(capture_frame(forwards=300))
    wait_for(lambda: request in bench.daemon.started, "the start")
    bench.daemon.orders = Orders(drain=True)
    assert worker.wait(30) == 0
    assert bench.daemon.outcome(request).error is None
    assert bench.end_record("by-hand").cause == "drained"


@pytest.mark.parametrize(("number", "cause"), [(signal.SIGUSR2, "drained"), (signal.SIGINT, "cancelled")])
def test_a_signal_while_it_starts_is_not_lost(bench, number, cause):
    """A worker that is told to end before it has imported torch ends in order, and says so."""
    worker = bench.worker()
    wait_for(lambda: bench.daemon.hellos, "its registration")
    worker.send_signal(number)
    assert worker.wait(30) == 0
    assert cause == bench.end_record().cause


def test_a_model_that_is_not_there_ends_the_worker_with_the_words(bench):
    """A load failure ends with code 1; the words are in the end record, at the daemon, and last in the log."""
    bench.spec = msgspec.structs.replace(bench.spec, model="/no/such/model")
    worker = bench.worker()
    assert worker.wait(60) == 1
    record = bench.end_record()
    assert record.cause == "failed"
    assert "there is no such folder for a model" in record.detail
    assert "/no/such/model" in record.detail
    assert [record] == bench.daemon.ends
    assert bench.log().rstrip().endswith(record.detail)
    assert "Traceback" not in bench.log()


def test_a_secret_that_others_can_read_is_refused(bench):
    """A worker does not use a secret that is not private; it says the mode, and does not even dial."""
    bench.places.secret.chmod(0o644)
    worker = bench.worker()
    assert worker.wait(30) == 1
    assert "0644" in bench.end_record().detail
    assert bench.daemon.hellos == []
    assert bench.daemon.refused == 0


def test_a_wrong_secret_ends_the_worker(bench):
    """A daemon that refuses the secret at registration ends the worker before it loads anything."""
    bench.places.secret.write_text("not-the-secret")
    assert bench.worker().wait(30) == 1
    assert "the secret is wrong" in bench.end_record().detail
    assert bench.daemon.refused > 0


def test_another_certificate_is_not_trusted(bench):
    """A server with another certificate than the lease's gets no call, and so no secret."""
    other = bench.places.certificate.read_text()
    bench.daemon.stop()
    bench.places.certificate.unlink()
    bench.daemon.start()  # makes a new certificate
    record = msgspec.json.decode(bench.places.lease.read_bytes())
    bench.places.lease.write_bytes(msgspec.json.encode(record | {"certificate": other}))
    worker = bench.worker(job=False)
    time.sleep(3)
    assert worker.poll() is None
    assert bench.daemon.hellos == []
    assert bench.daemon.refused == 0
    assert "certificate verify failed" in bench.log()


def test_a_worker_without_a_daemon_loads_and_waits(bench):
    """With job.json at hand it loads while no daemon listens, registers when one comes, and serves."""
    bench.daemon.stop()
    bench.daemon.unknown.add("w1")
    worker = bench.worker()
    wait_for(lambda: "is loaded and has answered" in bench.log(), "the loaded model", 60)
    assert worker.poll() is None
    bench.daemon.unknown.clear()
    bench.daemon.start()
    request = bench.daemon.submit(capture_frame())
    assert bench.daemon.outcome(request).error is None


def test_a_worker_that_no_daemon_knows_ends(bench):
    """A replica that the daemon does not know, and does not take up, ends with the daemon's words."""
    bench.daemon.unknown.add("w1")
    assert bench.worker().wait(30) == 1
    assert "no such replica" in bench.end_record().detail


def test_one_of_several_tasks_is_refused(bench):
    """As one of several tasks of a job step a worker says that there is no tensor parallelism yet, and dials nobody."""
    assert bench.worker(SLURM_STEP_NUM_TASKS="2").wait(30) == 1
    assert "tensor parallelism is not in this version" in bench.end_record().detail
    assert bench.daemon.hellos == []


def test_a_pool_of_several_tasks_is_refused(bench):
    """A pool that asks for several tasks is refused also when this process is alone, before anything is loaded."""
    bench.spec = msgspec.structs.replace(bench.spec, nodes=2, tasks_per_node=2)
    assert bench.worker().wait(30) == 1
    assert "has 4 tasks" in bench.end_record().detail
    assert "LOADING" not in [report.state for report in bench.daemon.reports]


def test_an_unusable_replica_id_is_refused(bench):
    """A replica id that is not a plain name is a usage error, and no folder is made for it."""
    worker = bench.worker("w1", job=False)
    worker.kill()
    command = [*worker.args[:-1], "../evil"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 2
    assert "cannot be the name of a replica" in done.stderr
    assert not (bench.places.replicas.parent / "evil").exists()
