"""A worker small enough to test executors with: it says what happens to it, and behaves as $BEHAVIOUR wants."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

behaviour = os.environ.get("BEHAVIOUR", "")


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())  # a line at once: launchers mix the parts of those of several ranks


def drain(*_: object) -> None:
    say("got USR2")
    if behaviour == "deaf":
        return
    time.sleep(1.0)  # what it holds is finished first
    say("clean end")
    sys.exit(0)


def terminate(*_: object) -> None:
    say("got TERM")
    if behaviour != "stubborn":
        time.sleep(0.1)
        say("terminated")
        sys.exit(3)


signal.signal(signal.SIGUSR2, drain)
signal.signal(signal.SIGTERM, terminate)
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
folder = Path(arguments["--home"]) / "replicas" / arguments["--replica"]
say(f"works in {Path.cwd()}, sees {os.environ.get('SECRET_TOKEN')}, has {os.environ.get('SLURM_CPUS_PER_TASK')} CPUs")
if behaviour == "mpi":
    from mpi4py import MPI

    say(f"rank sum {MPI.COMM_WORLD.allreduce(MPI.COMM_WORLD.rank)} of {MPI.COMM_WORLD.size}")
    sys.exit(0)
if behaviour == "fail":
    sys.exit(7)
if behaviour == "crash":
    os.kill(os.getpid(), signal.SIGKILL)
(folder / "up").touch()
while True:
    time.sleep(0.1)
