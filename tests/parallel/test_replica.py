"""The ranks that tests keep: they end with the tests, however those end, and a failure of theirs is a test's failure."""

import os
import signal
import subprocess
import sys

import psutil
import pytest

from tests.parallel.ranks import ROOT
from tests.parallel.replica import Gone, Question, Replicas

_PROGRAM = """
import os, psutil
from tests.parallel.replica import Replica
replica = Replica(2)
print(*(child.pid for child in psutil.Process(os.getpid()).children(recursive=True)), flush=True)
input()
"""


def test_ranks_end_when_the_tests_are_killed(tmp_path):
    """After SIGKILL to the process that started them, neither the ranks nor their launcher stay."""
    command = [sys.executable, "-c", _PROGRAM]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    tests = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    started = [psutil.Process(int(pid)) for pid in tests.stdout.readline().split()]
    assert len(started) >= 4, "timeout, mpirun and two ranks"
    tests.send_signal(signal.SIGKILL)
    tests.communicate()
    _, alive = psutil.wait_procs(started, timeout=120)
    assert alive == []


def test_ranks_that_fail_say_why_and_are_started_again(tmp_path):
    """What ends the ranks is in the error of who asked them, and the next who asks gets new ones."""
    replicas = Replicas()
    first = replicas.of(2)
    with pytest.raises(Gone, match="there is no such folder for a model"):
        first.ask(Question(model=str(tmp_path / "nothing")), b"")
    second = replicas.of(2)
    replicas.close()
    assert second is not first
    assert not second.alive
