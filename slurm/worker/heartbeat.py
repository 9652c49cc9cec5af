"""The thread that tells the daemon how the worker is, and takes the daemon's orders from the answers."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

from nnsight_hpc.slurm.worker.link import Backoff, DaemonAddress, Link
from nnsight_hpc.wire.errors import HpcError, NotFound, Unreachable
from nnsight_hpc.wire.workers import Orders, WorkerReport

if TYPE_CHECKING:
    from nnsight_hpc.slurm.worker.control import Control

_IDLE, _ACTIVE, _PROGRESS = 15.0, 5.0, 1.0
_DEBOUNCE = 0.1
"""Between two reports at least: a worker that runs many short requests changes its state far more often."""
logger = logging.getLogger(__name__)


class Heartbeat:
    """Reports every 15 s when idle, every 5 s otherwise, and at each change of state; a dump's progress every second."""

    def __init__(self, control: Control, address: DaemonAddress) -> None:
        self._control = control
        self._link = Link(address)
        self._stopped = threading.Event()
        self._backoff = Backoff()
        self._reported = float("-inf")
        self._last: WorkerReport | None = None
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Report no more; what is being reported now is cut off."""
        self._stopped.set()
        self._control.changed.set()
        self._link.abandon()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.is_set():
            self._control.changed.wait(self._beat())
            self._stopped.wait(_DEBOUNCE)

    def _beat(self) -> float:
        """Say what is due, and return the seconds until the next beat."""
        try:
            self._report()
            self._report_progress()
        except Unreachable:
            return self._backoff.next()
        except NotFound:  # a daemon that does not know us; the courier registers
            return _ACTIVE
        except HpcError as error:
            logger.warning("the daemon refused a report\n%s", error)
            return _ACTIVE
        self._backoff = Backoff()
        if self._control.is_dumping:
            return _PROGRESS
        return _IDLE if self._control.idle else _ACTIVE

    def _report(self) -> None:
        if not self._control.changed.is_set() and time.monotonic() - self._reported < _ACTIVE:
            return
        self._control.changed.clear()
        report = self._control.report()
        if report == self._last and time.monotonic() - self._reported < _ACTIVE:
            return  # it was busy for less than a moment
        self._reported = float("-inf")  # still due, unless it arrives
        self._control.obey(self._link.once("/w1/report", report, Orders))
        self._reported, self._last = time.monotonic(), report

    def _report_progress(self) -> None:
        if reported := self._control.progress_to_report():
            request, progress = reported
            path = f"/w1/progress?replica={self._control.replica}&id={request}"
            self._control.obey(self._link.once(path, progress, Orders))
