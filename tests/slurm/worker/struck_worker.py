"""A program: a worker that sends itself a signal before the ninth batch of its first dump, and goes on when it is heard.

python -m tests.slurm.worker.struck_worker SIGNAL …    as nnsight_hpc.slurm.worker …
"""

from __future__ import annotations

import itertools
import os
import runpy
import signal
import sys
import threading
from typing import Any

from nnsight_hpc.slurm.worker.signals import block_signals

block_signals()  # as the worker does, before torch has threads of its own

from nnsight_hpc.slurm.worker import control  # noqa: E402 - only now
from nnsight_hpc.slurm.worker import dump as dump_module  # noqa: E402
from nnsight_hpc.slurm.worker.scribe import OwnScribe  # noqa: E402

_BATCH = 9


def main() -> None:
    number = signal.Signals[sys.argv.pop(1)]
    dump_module.SLICE_ROWS = 256
    heard, batches = threading.Event(), itertools.count(1)
    drain, put = control.Control.drain, OwnScribe.put

    def drain_and_tell(self: control.Control) -> None:
        drain(self)
        heard.set()

    def put_or_stop(self: OwnScribe, values: Any) -> None:
        if next(batches) == _BATCH:
            os.kill(os.getpid(), number)
            heard.wait()
        put(self, values)

    control.Control.drain, OwnScribe.put = drain_and_tell, put_or_stop  # type: ignore[method-assign]
    runpy.run_module("nnsight_hpc.slurm.worker", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
