"""An order to cancel ends what runs long before its own end, also where it looks nowhere into the model."""

from __future__ import annotations

import pytest

from nnsight_hpc.wire.workers import Orders
from tests.slurm.worker.graphs import MINUTES, capture_frame, dump_frame, endless_frame
from tests.slurm.worker.stand_in import wait_for


@pytest.mark.parametrize(
    ("kind", "frame"),
    [
        ("run", endless_frame),
        ("dump", lambda: dump_frame(["one two three"] * MINUTES, ("lm_head.output",), name="given-up", batch_tokens=6)),
    ],
    ids=["generation", "dump"],
)
def test_what_would_take_minutes_ends_at_once(resident, kind, frame):
    """It ends as cancelled, and the worker serves on."""
    daemon = resident.daemon
    request = daemon.submit(frame(), kind=kind)
    wait_for(lambda: daemon.progress.get(request) if kind == "dump" else daemon.lines(request), "its middle")
    daemon.orders = Orders(cancel=(request,))
    outcome = daemon.outcome(request)
    daemon.orders = Orders()
    assert (outcome.cancelled, outcome.error) == (True, None)
    assert daemon.outcome(daemon.submit(capture_frame())).error is None
