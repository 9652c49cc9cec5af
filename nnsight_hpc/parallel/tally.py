"""How far each rank is with something long, told to rank 0 while it does the same: messages that nobody waits for.

A message is 16 bytes, and is left out while the one before has not left; so a rank that rank 0 is slow to hear loses nothing.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Self

import numpy as np

from nnsight_hpc.parallel.mpi import MPI

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from nnsight_hpc.parallel.progress import Progress
    from nnsight_hpc.parallel.world import World

_NAP = 0.02


class Tally:
    """The shares, from 0 to 1, that the ranks have done. Creating and closing it is collective.

    It is a context manager around the work, which may fail on any rank. Leaving it, rank 0 waits for the others and goes on
    telling; but not when its own work failed, since the others may then wait for it.

    Parameters
    ----------
    tell
        Called on rank 0 with the shares of all ranks, by those of its methods that rank 0 calls.
    """

    def __init__(self, world: World, progress: Progress, tell: Callable[[list[float]], None]) -> None:
        self._comm, self._progress, self._tell = world.comm.Dup(), progress, tell
        self._shares = [0.0] * world.size
        self._at_work = {*range(1, world.size)}
        self._sent: list[tuple[MPI.Request, np.ndarray]] = []

    def report(self, share: float) -> None:
        """Say how far this rank is."""
        if self._comm.rank == 0:
            self._shares[0] = share
            self._receive()
            self._tell([*self._shares])
        else:
            self._send(share, at_work=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, failed: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        if self._comm.rank:
            self._send(self._shares[self._comm.rank], at_work=False)
        elif not failed:
            self._wait(lambda: self._tell([*self._shares]))

    def close(self) -> None:
        """Take all messages that are on their way, once all ranks have left the work."""
        if self._comm.rank == 0:
            self._wait(lambda: None)
        for request, _ in self._sent:
            request.Wait()
        self._comm.Free()

    def _wait(self, heard: Callable[[], None]) -> None:
        """Wait until the others have left the work; to the watchdog, this rank is alive though it does nothing."""
        self._progress.waiting = True
        try:
            while self._at_work:
                if self._receive():
                    heard()
                time.sleep(_NAP)
        finally:
            self._progress.waiting = False

    def _send(self, share: float, *, at_work: bool) -> None:
        self._shares[self._comm.rank] = share
        with self._progress.lock:
            self._sent = [(request, message) for request, message in self._sent if not request.Test()]
            if not (self._sent and at_work):
                message = np.array([share, at_work])
                self._sent.append((self._comm.Isend(message, dest=0), message))

    def _receive(self) -> bool:
        """Take what has come; whether anything has."""
        status, message, heard = MPI.Status(), np.empty(2), False
        with self._progress.lock:
            while self._comm.Iprobe(source=MPI.ANY_SOURCE, status=status):
                self._comm.Recv(message, source=status.source)
                self._shares[status.source], heard = float(message[0]), True
                if not message[1]:
                    self._at_work.discard(status.source)
        return heard
