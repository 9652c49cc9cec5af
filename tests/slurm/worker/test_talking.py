"""Requests that say something while they run."""

from __future__ import annotations

import time

import pytest

from nnsight_hpc.slurm.worker.said import MOST
from nnsight_hpc.wire.errors import Conflict
from nnsight_hpc.wire.workers import Orders
from tests.slurm.worker.graphs import endless_frame, talking_frame
from tests.slurm.worker.stand_in import wait_for


def test_lines_come_while_the_request_runs(resident):
    """The first line is with the daemon minutes before the outcome would be."""
    daemon = resident.daemon
    request = daemon.submit(endless_frame())
    wait_for(lambda: daemon.lines(request), "the first line")
    assert not daemon.outcomes[request]
    daemon.orders = Orders(cancel=(request,))
    assert daemon.outcome(request).cancelled
    daemon.orders = Orders()


def test_all_lines_come_before_the_outcome(resident):
    """In their order, each with the user's line that said it."""
    daemon = resident.daemon
    request = daemon.submit(talking_frame(300))
    assert daemon.outcome(request).error is None
    lines = daemon.lines(request)
    assert [f"mean {number}" for number in range(300)] == [" ".join(line.text.split()[:2]) for line in lines]
    assert "x.py:3" in lines[0].source
    assert lines[0].time <= lines[-1].time <= time.time()


def test_many_lines_share_a_call(resident):
    """Lines are sent a few times a second, however many there are."""
    daemon = resident.daemon
    request = daemon.submit(talking_frame(300))
    begun = time.monotonic()
    daemon.outcome(request, 120)
    seconds = time.monotonic() - begun
    assert len(daemon.lines(request)) == 300
    assert sum(one == request for one, _ in daemon.posts) <= 10 * seconds + 2


def test_a_request_may_not_talk_for_ever(resident):
    """Beyond a mebibyte one line says that there would be more, and the request completes."""
    daemon = resident.daemon
    request = daemon.submit(talking_frame(150, line="x" * 10_000))
    assert daemon.outcome(request, 120).error is None
    assert MOST < len(daemon.said[request]) < 1.1 * MOST
    assert "the log ends here" in daemon.lines(request)[-1].text


def test_a_log_that_nobody_takes_stops_nothing(resident):
    """When the daemon wants no more lines, the request goes on and the next one may talk again."""
    daemon = resident.daemon
    daemon.log_error = Conflict("no space left")
    request = daemon.submit(talking_frame(3))
    assert daemon.outcome(request).error is None
    daemon.log_error = None
    after = daemon.submit(talking_frame(2))
    assert daemon.outcome(after).error is None
    assert (daemon.lines(request), len(daemon.lines(after))) == ([], 2)


def test_a_second_attempt_is_told_apart(resident):
    """Its log begins with a line that says that the request runs again."""
    daemon = resident.daemon
    request = daemon.submit(talking_frame(1), attempt=2)
    daemon.outcome(request)
    assert [line.text.split(":")[0][:9] for line in daemon.lines(request)] == ["(attempt ", "mean 0 of"]


@pytest.mark.parametrize("restart", [False, True])
def test_lines_wait_for_a_daemon_that_is_away(bench, restart):
    """What was said while no daemon listened comes in one piece when there is one again, and then the outcome."""
    bench.ready_worker()
    request = bench.daemon.submit(talking_frame(200))
    wait_for(lambda: bench.daemon.lines(request), "the first line")
    bench.daemon.stop()
    time.sleep(1 if restart else 0)
    bench.daemon.start()
    assert bench.daemon.outcome(request, 120).error is None
    assert len(bench.daemon.lines(request)) == 200
