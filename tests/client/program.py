"""The program, called in this process or as one of its own, and what a daemon's answers are made of."""

from __future__ import annotations

import json
import os
import pty
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from click.testing import CliRunner

from nnsight_hpc.client.cli import program
from nnsight_hpc.wire.pools import PoolSpec, PoolStatus, ReplicaStatus

if TYPE_CHECKING:
    from collections.abc import Callable

    from nnsight_hpc.wire.states import ReplicaState

PROGRAM = [sys.executable, "-m", "nnsight_hpc.client"]


def call(*arguments: str, code: int = 0):
    """A command's stdout and stderr; it must end with `code`."""
    done = CliRunner().invoke(program, list(arguments))
    assert done.exit_code == code, done.output
    return done.stdout, done.stderr


def answer(*arguments: str, code: int = 0):
    return json.loads(call("--json", *arguments, code=code)[0])


def replica(state: ReplicaState, name: str = "smol-1", **more) -> ReplicaStatus:
    return ReplicaStatus(id=name, pool="smol", state=state, job_id="17", submitted=time.time(), **more)


def pool(server, *replicas: ReplicaStatus) -> None:
    server.pools["smol"] = PoolStatus(spec=PoolSpec(name="smol", model="m"), desired=1, replicas=replicas)


def once(condition: Callable[[], Any], action: Callable[[], Any]) -> None:
    """Do something in the background as soon as there is reason to."""

    def watch() -> None:
        while not condition():
            time.sleep(0.02)
        action()

    threading.Thread(target=watch, daemon=True).start()


def on_terminal(command: list[str], *, typed: bytes, at: str = "") -> str:
    """What a command shows on a terminal of its own, where `typed` is typed once `at` has been shown."""
    process, terminal = pty.fork()
    if process == 0:
        os.environ["TERM"] = "xterm"
        os.execv(command[0], command)
    shown = b""
    while True:
        try:
            data = os.read(terminal, 4096)
        except OSError:
            break
        if not data:
            break
        shown += data
        if typed and at.encode() in shown:
            os.write(terminal, typed)
            typed = b""
    os.close(terminal)
    os.waitpid(process, 0)
    return shown.decode("utf-8", "replace")
