"""Signals, taken by a thread of their own, so that they act at once whatever the other threads are doing.

SIGUSR2 drains the worker: it finishes what it runs and ends. SIGTERM and SIGINT end it, and what runs is given up at
its next module boundary, without an outcome: the daemon hands the request to another worker.
"""

from __future__ import annotations

import logging
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


def watch_signals(control: Control) -> None:
    """Start the thread that hands signals to `control`; it lives as long as the process."""
    threading.Thread(target=_watch, args=(control,), name="signals", daemon=True).start()


def _watch(control: Control) -> None:
    while True:
        number = signal.sigwait(_TAKEN)
        logger.info("%s received", signal.Signals(number).name)
        if number == signal.SIGUSR2:
            control.drain()
        else:
            control.terminate()
