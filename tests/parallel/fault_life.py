"""``python -m mpi4py -m tests.parallel.fault_life SIGNAL FOLDER``: the last rank gets a signal in the midst of a request.

Each rank writes its last words to ``FOLDER/last-RANK``, and the one that gets the signal makes ``FOLDER/struck`` before.
"""

from __future__ import annotations

import os
import signal
import sys
from functools import partial
from pathlib import Path

from tests.parallel.fault_checks import build, request
from tests.parallel.fault_injection import Fault
from tests.parallel.fault_programs import gradient
from tests.parallel.life import begin
from tests.parallel.rank import Rank

LIMIT = {"SIGSTOP": 5.0, "SIGKILL": 60.0}
"""Seconds until the watchdog ends the job; a rank that is killed is to be seen by the launcher long before."""


def strike(number: int, folder: Path) -> None:
    (folder / "struck").touch()
    os.kill(os.getpid(), number)


def main(name: str, folder: Path) -> None:
    world, guard, group = begin(folder, LIMIT[name])
    here = Rank(world, guard, group)
    model = build(here, [gradient])
    middle = len(model.passed[gradient][-1]["word"]) // 2
    fault = Fault(world.size - 1, ("word", middle), partial(strike, getattr(signal, name), folder))
    request(here, model, gradient, [fault])


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
