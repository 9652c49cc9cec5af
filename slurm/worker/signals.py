"""Signals, taken by a thread of their own, so that they act at once whatever the other threads are doing.

SIGUSR2 drains the worker: it finishes what it runs and ends. SIGTERM and SIGINT end it, and what runs is given up at
its next module boundary, without an outcome: the daemon hands the request to another worker.

Slurm and mpirun send them to all ranks. Rank 0 acts; the others wait until it lets them go, but not for ever: it may be dead.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nnsight_hpc.slurm.worker.control import Control

_TAKEN = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
logger = logging.getLogger(__name__)


def block_signals() -> None:
    """Hold our signals back in this thread and in all that it starts, until `watch_signals` takes them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _TAKEN)


def watch_signals(control: Control, outlive: float | None) -> None:
    """Start the thread that hands signals to `control`; it lives as long as the process.

    Parameters
    ----------
    outlive
        End the process so many seconds after SIGTERM, should it still be there; None: whoever sent it will.
    """
    threading.Thread(target=_watch, args=(control, outlive), name="signals", daemon=True).start()


def _watch(control: Control, outlive: float | None) -> None:
    while True:
        number = signal.sigwait(_TAKEN)
        logger.info("%s received", signal.Signals(number).name)
        if number == signal.SIGUSR2:
            control.drain()
            continue
        control.terminate()
        if outlive is not None:
            timer = threading.Timer(outlive, os._exit, (1,))
            timer.daemon = True
            timer.start()
