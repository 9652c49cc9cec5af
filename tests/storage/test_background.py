import threading
import time
from queue import Empty, SimpleQueue

import pytest

from nnsight_hpc.storage.background import BackgroundThread


def _producer(thread, gate, count, size, submitted):
    for _ in range(count):
        thread.submit(gate.wait, size)
        submitted.put(size)


def test_a_full_queue_blocks_the_producer_until_there_is_room():
    """Of ten jobs of 10 bytes, three fit into 30 bytes while the first one runs."""
    thread, gate, submitted = BackgroundThread(30, "test"), threading.Event(), SimpleQueue()
    producer = threading.Thread(target=_producer, args=(thread, gate, 10, 10, submitted))
    producer.start()
    assert [submitted.get(timeout=120) for _ in range(3)] == [10] * 3
    with pytest.raises(Empty):
        submitted.get(timeout=0.3)
    gate.set()
    producer.join()
    thread.finish()
    assert submitted.qsize() == 7


def test_a_job_larger_than_the_limit_runs_alone():
    """A block that does not fit is not refused, and does not wait for ever."""
    thread, done = BackgroundThread(10, "test"), []
    for size in (4, 100, 4):
        thread.submit(lambda size=size: done.append(size), size)
    thread.finish()
    assert done == [4, 100, 4]


def test_an_error_reaches_the_producer_and_drops_the_jobs_behind_it():
    """The exception of a job is raised at the next call, also when the producer waits for room."""
    thread, gate, done = BackgroundThread(10, "test"), threading.Event(), []

    def fail():
        gate.wait()
        raise OSError(5, "broken")

    thread.submit(fail, 5)
    thread.submit(lambda: done.append(1), 5)
    threading.Timer(0.1, gate.set).start()
    with pytest.raises(OSError, match="broken"):
        thread.submit(lambda: done.append(2), 5)
    with pytest.raises(OSError, match="broken"):
        thread.finish()
    assert done == []


def test_abandoning_drops_what_waits_and_ends_the_thread():
    """After an abandoned slice no thread is left and no job runs any more."""
    thread, gate, done = BackgroundThread(100, "test"), threading.Event(), []

    def until_the_next_is_dropped():
        gate.wait()
        while thread._jobs:
            time.sleep(0.01)

    thread.submit(until_the_next_is_dropped, 1)
    thread.submit(lambda: done.append(1), 1)
    gate.set()
    thread.abandon()
    assert done == []
    assert not thread._thread.is_alive()
