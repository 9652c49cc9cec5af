"""Reading ahead leaves nothing behind: not at the end, not when it is dropped, interrupted, or forked."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from nnsight_hpc.storage.ahead import read_ahead


def _readers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("dataset-reader")]


def test_items_come_in_order_and_the_thread_ends():
    """All items, once; then no thread is left."""
    assert list(range(1, 50)) == list(read_ahead(iter(range(1, 50))))
    assert _readers() == []
    assert list(read_ahead(iter(()))) == []


def test_one_item_is_prepared_while_one_is_in_use_and_no_more():
    """The next item is begun when one is handed out; the one after it is not."""
    begun = [threading.Event() for _ in range(4)]

    def items():
        for number in range(1, 4):
            begun[number].set()
            yield number

    ahead = read_ahead(items())
    assert next(ahead) == 1
    assert begun[2].wait(120)
    assert not begun[3].is_set()
    ahead.close()
    assert not begun[3].is_set()


def test_dropping_the_iterator_ends_the_thread_and_the_source():
    """Whoever stops early leaves no thread, and what was read from is closed."""
    closed = threading.Event()

    def items():
        try:
            while True:
                yield 1
        finally:
            closed.set()

    for _ in read_ahead(items()):
        break
    assert _readers() == []
    assert closed.is_set()


def test_an_error_of_the_source_is_raised_to_the_caller():
    """After the items before it; and the thread ends."""

    def items():
        yield 1
        raise OSError("gone")

    ahead = read_ahead(items())
    assert next(ahead) == 1
    with pytest.raises(OSError, match="gone"):
        next(ahead)
    assert _readers() == []


def test_a_forked_child_may_close_it_and_the_parent_goes_on():
    """The thread is not there in the child; closing does not wait for it."""
    ahead = read_ahead(iter(range(1, 100)))
    assert next(ahead) == 1
    child = os.fork()
    if not child:
        ahead.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert list(range(2, 100)) == list(ahead)


def test_ctrl_c_ends_a_program_that_waits_for_a_batch():
    """The program ends by the signal, with an iterator in a global and another that waits."""
    code = """
import itertools, time
from nnsight_hpc.storage.ahead import read_ahead
kept = read_ahead(itertools.count(1))
next(kept)
def slowly():
    print("ready", flush=True)
    for number in itertools.count(1):
        time.sleep(0.2)
        yield number
for item in read_ahead(slowly()):
    pass
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as program:
        assert program.stdout.readline() == b"ready\n"
        program.send_signal(signal.SIGINT)
        errors = program.communicate(timeout=120)[1].decode()
    assert program.returncode == -signal.SIGINT
    assert errors.splitlines()[-1] == "KeyboardInterrupt"
    assert errors.count("Traceback") == 1
