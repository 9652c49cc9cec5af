"""What a rank's threads share about a running request: how far it is, and whose turn it is to use MPI."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field


@dataclass
class Progress:
    """Written by the thread that runs requests, read by the watchdog's.

    Attributes
    ----------
    lock
        Held for each MPI call: one thread uses MPI at a time.
    running
        Set while a request runs.
    words
        How many words this rank has heard.
    waiting
        Whether this rank waits for the others' word: it is alive, though it does nothing.
    """

    lock: threading.Lock = field(default_factory=threading.Lock)
    running: threading.Event = field(default_factory=threading.Event)
    words: int = 0
    waiting: bool = False
