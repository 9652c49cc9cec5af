"""The thread that waits for the daemon's orders, so that a cancelled request ends at once and not at the next report."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from nnsight_hpc.slurm.worker.link import Backoff, DaemonAddress, Link
from nnsight_hpc.wire.errors import HpcError, NotFound
from nnsight_hpc.wire.workers import Orders

if TYPE_CHECKING:
    from nnsight_hpc.slurm.worker.control import Control

_POLL = 30.0
"""Seconds that the daemon may hold the question."""
_AGAIN = 1.0
"""Seconds until it is asked again after it had orders: they stand until what they are about has ended."""


class OrdersListener:
    """Obeys orders as they are given. What it misses while no daemon answers comes with the next report."""

    def __init__(self, control: Control, address: DaemonAddress) -> None:
        self._control, self._link = control, Link(address)
        self._stopped = threading.Event()
        self._backoff = Backoff()
        self._thread = threading.Thread(target=self._run, name="orders", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._link.abandon()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.is_set():
            self._stopped.wait(self._listen())

    def _listen(self) -> float:
        """Wait for orders once; the seconds until the next time."""
        path = f"/w1/orders?replica={self._control.replica}&wait={_POLL:g}"
        try:
            orders = self._link.once(path, None, Orders, timeout=_POLL + 15)
        except NotFound:  # a daemon that does not know us; the courier registers
            return _AGAIN
        except HpcError:
            return self._backoff.next()
        self._backoff = Backoff()
        self._control.obey(orders)
        return _AGAIN if orders != Orders() else 0.0
