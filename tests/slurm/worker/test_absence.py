"""A daemon that dies, comes back elsewhere, or wakes after it was superseded: the worker stays, and delivers once."""

from __future__ import annotations

import signal
import time

import pytest

from tests.slurm.worker.graphs import capture_frame


@pytest.fixture
def daemon(resident):
    """The stand-in of the resident worker, running, and in the end running again."""
    yield resident.daemon
    resident.daemon.stop()
    resident.daemon.start()


def test_a_killed_daemon_gets_the_result_once_it_is_back(resident, daemon):
    """The daemon dies while a request runs and comes back elsewhere: the outcome is delivered once, and work goes on."""
    hellos = len(daemon.hellos)
    request, pipe = daemon.submit_held()
    daemon.stop()
    pipe.write_bytes(capture_frame())
    time.sleep(1)
    assert resident.processes[0].poll() is None
    daemon.start()
    assert daemon.outcome(request).error is None
    after = daemon.submit(capture_frame())
    assert daemon.outcome(after).error is None
    assert len(daemon.outcomes[request]) == 1
    assert hellos == len(daemon.hellos)


def test_an_older_lease_is_not_followed(daemon):
    """A lease record of an older epoch than one already seen does not lead a worker back to a superseded daemon."""
    newest = daemon.epoch
    assert daemon.outcome(daemon.submit(capture_frame())).error is None  # the worker has seen it
    daemon.stop()
    daemon.epoch = newest - 2
    daemon.start()
    request = daemon.submit(capture_frame())
    time.sleep(2)
    assert not daemon.outcomes[request]
    daemon.stop()
    daemon.epoch = newest
    daemon.start()
    assert daemon.outcome(request).error is None


def test_a_daemon_that_has_forgotten_the_replica_is_told_again(daemon):
    """When a daemon answers that it does not know the replica, the worker registers again and goes on."""
    hellos = len(daemon.hellos)
    daemon.stop()
    daemon.forgotten = {"w1"}
    daemon.start()
    request = daemon.submit(capture_frame())
    assert daemon.outcome(request).error is None
    assert hellos + 1 == len(daemon.hellos)


def test_near_its_time_limit_a_worker_does_not_wait_for_a_daemon(bench):
    """An outcome that nobody takes does not keep a draining worker until Slurm kills it; it ends with success."""
    worker = bench.worker(NNSIGHT_HPC_ENDS=str(int(time.time())))
    bench.daemon.wait_state("READY")
    _, pipe = bench.daemon.submit_held()
    bench.daemon.stop()
    pipe.write_bytes(capture_frame())
    worker.send_signal(signal.SIGUSR2)
    assert worker.wait(120) == 0
    assert bench.end_record().cause == "DRAINED"
