"""What the tabulator key gives: commands, options, pools, requests and clusters."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

from nnsight_hpc.client import config
from nnsight_hpc.client.config import Cluster
from nnsight_hpc.wire.messages import RequestStatus
from nnsight_hpc.wire.states import ReplicaState, RequestState
from tests.client.program import pool, replica
from tests.client.sshd import PROGRAM as INSTALLED

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


_PATIENT = """
import sys
from nnsight_hpc.client import cli, completion
completion._PATIENCE, sys.argv = 120.0, ["nnsight-hpc"]
cli.main()
"""
PATIENT = [sys.executable, "-c", _PATIENT]
"""The program, which waits longer for a daemon than a person would: this machine may be busy."""


def completed(*words: str, program: Sequence[str | Path] = PATIENT) -> list[str]:
    """What bash is offered for the last of these words."""
    asked = {"COMP_WORDS": " ".join(["nnsight-hpc", *words]), "COMP_CWORD": str(len(words))}
    environment = {**os.environ, **asked, "_NNSIGHT_HPC_COMPLETE": "bash_complete"}
    done = subprocess.run(program, env=environment, check=True, capture_output=True, text=True)
    assert done.stderr == ""
    return [line.split(",")[1] for line in done.stdout.split()]


def test_commands_and_options_are_completed(base):
    """As the program lists them."""
    assert completed("re", program=[INSTALLED]) == ["resume", "result"]
    assert completed("status", "--wa") == ["--watch"]


def test_names_of_pools_are_completed(server):
    """Defined ones, and those that the daemon knows."""
    pool(server, replica(ReplicaState.READY))
    path = config.config_file()
    path.parent.mkdir()
    path.write_text('[pool.small]\nmodel = "m"\n[pool.other]\nmodel = "m"\n')
    for command in ("up", "plan", "resume", "explain", "logs", "down", "dump"):
        assert completed(command, "sm") == ["small", "smol"]
    assert completed("run", "--pool", "o") == ["other"]


def test_ids_of_requests_are_completed(server):
    """The latest first; for commands that wait or cancel only those that have not ended."""
    for name, state in (("r-aa", RequestState.RUNNING), ("r-ab", RequestState.QUEUED), ("r-ac", RequestState.FAILED)):
        server.requests[name] = RequestStatus(id=name, kind="run", pool="smol", state=state, user="alice")
    for command in ("show", "result", "explain", "logs"):
        assert completed(command, "r-") == ["r-ac", "r-ab", "r-aa"]
    for command in ("wait", "cancel"):
        assert completed(command, "") == ["r-ab", "r-aa"]


def test_nobody_is_logged_in_for_a_completion(base):
    """Of a cluster without an open connection the definitions are known, at once."""
    config.add("uni", Cluster(host="alice@192.0.2.1"), default=True)
    path = config.config_file()
    path.write_text(f'{path.read_text()}\n[pool.smol]\nmodel = "m"\n')
    assert completed("-c", "u") == ["uni"]
    assert completed("-c", "uni", "up", "") == ["smol"]


def test_a_broken_configuration_completes_to_nothing(base):
    """The command itself will tell."""
    path = config.config_file()
    path.parent.mkdir()
    path.write_text("[pool")
    assert completed("up", "") == []
