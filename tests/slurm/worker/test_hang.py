"""A worker whose model's thread stands still ends itself, with the reason; one that works, however long, does not."""

from __future__ import annotations

import hashlib
import os
import random
import threading
import time

import pytest

from nnsight_hpc.slurm.worker.control import Control
from nnsight_hpc.slurm.worker.hang import HangWatch
from tests.slurm.worker.graphs import capture_frame

LIMIT = 0.4
SOON = """
import runpy, sys
from nnsight_hpc.slurm.worker.hang import HangWatch
HangWatch.__init__.__defaults__ = (3.0,)
runpy.run_module("nnsight_hpc.slurm.worker", run_name="__main__", alter_sys=True)
"""
"""A worker that takes three seconds for a hang, and not ten minutes."""


class Watched:
    """A thread that does something under a watch; `end` has the reason when that took it to hang.

    Once it is `done`, `hung` says whether it was taken to hang before.
    """

    def __init__(self, control, do):
        self.end = None
        self.hung = False
        self.ended, self.done = threading.Event(), threading.Event()

        def run():
            HangWatch(control, self._note, limit=LIMIT)
            do()
            self.hung = self.ended.is_set()
            self.done.set()

        threading.Thread(target=run, daemon=True).start()

    def _note(self, error):
        self.end = error
        self.ended.set()


@pytest.fixture
def control():
    control = Control("w1")
    control.busy("r-1")
    return control


def test_a_thread_that_stands_still_hangs(control):
    """The reason names the request, for how long, and the line where the thread stands."""
    forever = threading.Event()
    watched = Watched(control, forever.wait)
    assert watched.ended.wait(120)
    forever.set()
    assert "has not moved for 0.4 s" in watched.end.what
    assert "request r-1" in watched.end.where
    assert "threading.py" in watched.end.where
    assert "in wait" in watched.end.why


def test_a_thread_that_calls_things_does_not(control):
    """To go from one operation to the next is enough, however little of a core it takes."""
    done = threading.Event()

    def work():
        while not done.wait(random.uniform(0, LIMIT / 20)):
            time.sleep(random.uniform(0, LIMIT / 20))

    watched = Watched(control, work)
    assert not watched.ended.wait(4 * LIMIT)
    done.set()


def test_one_that_does_the_same_again_and_again_does_not(control):
    """A graph of a thousand equal operations is at one and the same place of the program all the time."""
    done = threading.Event()

    def work():
        while not control.is_cancelled("r-1"):
            done.wait(LIMIT / 8)

    watched = Watched(control, work)
    assert not watched.ended.wait(4 * LIMIT)
    control.terminate()


def test_one_that_waits_for_a_request_does_not():
    """An idle worker may be so for days."""
    control = Control("w1")
    control.ready()
    forever = threading.Event()
    watched = Watched(control, forever.wait)
    assert not watched.ended.wait(4 * LIMIT)
    control.busy("r-1")  # and the watch goes on
    assert watched.ended.wait(120)
    forever.set()


def test_bytes_that_come_are_progress_too():
    """One call may read for hours, while the bytes that are there grow."""
    control, forever = Control("w1"), threading.Event()
    watched = Watched(control, forever.wait)
    for loaded in range(20):
        control.copying(loaded, 20)
        assert not watched.ended.wait(LIMIT / 5)
    assert watched.ended.wait(120)
    assert "loading" in watched.end.where
    forever.set()


@pytest.mark.parametrize("loading", [True, False])
def test_to_use_a_core_is_progress_only_while_loading(loading):
    """One call may convert a whole model; but what waits for a stuck GPU uses a whole core as well."""
    control = Control("w1")
    if not loading:
        control.busy("r-1")
    begun = time.thread_time()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000)
    rounds = int(100_000 * 4 * LIMIT / (time.thread_time() - begun))
    watched = Watched(control, lambda: hashlib.pbkdf2_hmac("sha256", b"", b"", rounds))
    assert watched.done.wait(120)
    assert watched.hung is not loading


def test_a_worker_that_hangs_ends_and_says_so(bench):
    """A request whose file does not answer, as on a dead file server: LOST, to the daemon and in the file, with the stack."""
    worker = bench.ready_worker(program=("-c", SOON))
    assert bench.daemon.outcome(bench.daemon.submit(capture_frame(forwards=20))).error is None
    os.mkfifo(bench.places.requests / "stuck.request")
    bench.daemon.submit(None, request="stuck")
    assert worker.wait(120) == 70
    record = bench.end_record()
    assert record.cause == "LOST"
    assert "has not moved for 3 s" in record.detail
    assert "request stuck" in record.detail
    assert [record] == bench.daemon.ends
    assert "frame_of" in bench.log()
