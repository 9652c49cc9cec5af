"""How a process of a replica ends when it cannot go on by itself: the reason is handed over, then os._exit.

A thread that finds the main thread stuck in MPI or in the kernel can neither interrupt it nor leave with an exception.
Slurm (``srun --kill-on-bad-exit``) and mpirun end the other ranks when one of them exits with an error.
"""

from __future__ import annotations

import logging
import os
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from nnsight_hpc.wire.errors import HpcError

EXIT_CODE = 70
"""EX_SOFTWARE of sysexits.h."""
logger = logging.getLogger(__name__)


def end_process(error: HpcError, last_words: Callable[[HpcError], None]) -> None:
    """Hand `error` to `last_words` (which writes it where people look), and end this process at once."""
    try:
        logger.error("this process ends: %s", error)
        last_words(error)
    finally:
        os._exit(EXIT_CODE)


@contextmanager
def ending_after(seconds: float, error: HpcError, last_words: Callable[[HpcError], None]) -> Iterator[None]:
    """End the process with `error` unless the block is left within `seconds`."""
    timer = threading.Timer(seconds, end_process, (error, last_words))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
