"""Ends this process when another rank hangs while a request runs, so that Slurm ends the job and a new replica starts.

A rank that is killed is noticed by srun and mpirun, which end the others. A rank that hangs is not: a deadlock, a stuck
file system, a stopped process, a frozen node. Its peers wait at a word, which looks the same as waiting for a rank that
computes for minutes in one operation, and that is legal. So the ranks send heartbeats:

- Only while a request runs and no word has passed for a moment; otherwise words show that all is well. An idle replica,
  and one that is busy as usual, send none. The watchdog's thread then costs nothing, or a look a second.
- Only while the process works: it has used a core since the last heartbeat, or read or written files (`pulse`), or it waits
  for a word. A heartbeat says which. So a rank whose main thread is blocked falls silent, as one that is stopped does.
- Over MPI, from the watchdog's thread, in turn with the main thread (`Progress.lock`): no port, no address, no new way
  to fail, and any number of nodes.

A peer that was silent for `limit` seconds hangs. When nobody has worked for so long, this rank itself hangs, or all wait for
one another and the program is stuck. When a collective's data has not passed for so long, a peer has died within it. Then
the reason is handed over and the process ends; rank 0 first, since it writes the replica's end record.

What is not seen: an operation that computes for ever. Graphs have no such operation, and a request's time limit is
noticed at the next word.

A process that was itself stopped for a while (``scontrol suspend``) counts anew when it wakes.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import numpy as np

from nnsight_hpc.parallel.ending import end_process
from nnsight_hpc.parallel.mpi import MPI
from nnsight_hpc.parallel.pulse import Pulse
from nnsight_hpc.wire.errors import ReplicaFailed

if TYPE_CHECKING:
    from collections.abc import Callable

    from nnsight_hpc.parallel.progress import Progress
    from nnsight_hpc.parallel.world import World
    from nnsight_hpc.wire.errors import HpcError

LIMIT = 60.0
"""Seconds: longer than a file server needs to fail over, shorter than loading a large model again."""
_LOOKS = 20
"""In each `limit`."""
_LATE = 3
"""Looks after which a heartbeat is late; a rank that waits sends one at each."""
_WAITS, _WORKS = np.zeros(1, dtype=np.uint8), np.ones(1, dtype=np.uint8)
"""The heartbeats. Never written to: MPI may still be sending one."""
_NEXT = "the job ends, and the pool starts another replica; what the hanging rank did is in the replica's log"


class Watchdog:
    """Watches the other ranks from a thread of its own; one for each process. Creating it is collective.

    Parameters
    ----------
    last_words
        Takes the reason before the process ends; called on the watchdog's thread.
    limit
        Seconds of silence after which a rank counts as hanging.
    """

    def __init__(
        self, world: World, progress: Progress, last_words: Callable[[HpcError], None], limit: float = LIMIT
    ) -> None:
        self._world, self._progress, self._last_words = world, progress, last_words
        self._limit = limit if world.rank == 0 else 1.25 * limit
        self._tick = limit / _LOOKS
        self._comm = world.comm.Dup()
        self._pulse = Pulse()
        self._sent: dict[int, MPI.Request] = {
            rank: MPI.REQUEST_NULL for rank in range(world.size) if rank != world.rank
        }
        self._heard: dict[int, float] = {}
        self._somebody_worked = 0.0
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while True:
            self._progress.running.wait()
            self._watch_request()

    def _watch_request(self) -> None:
        words, looked = -1, time.monotonic()
        while self._progress.running.is_set():
            time.sleep(self._tick)
            before, looked = looked, time.monotonic()
            if words != self._progress.words or looked - before > self._limit / 2:
                words = self._progress.words
                self._heard = dict.fromkeys(self._sent, looked)
                self._somebody_worked = looked
            else:
                self._look(looked, words)

    def _look(self, now: float, words: int) -> None:
        """Send and hear heartbeats, and end the process when somebody has been silent for too long."""
        turn = self._progress.lock.acquire(timeout=self._tick)
        if turn:
            try:
                self._send(now)
                self._receive(now)
            finally:
                self._progress.lock.release()
        late = [self._world.name(rank) for rank, heard in self._heard.items() if now - heard > self._limit]
        if words != self._progress.words:
            return  # all is well, as of this moment
        if late and turn:
            self._end(f"{', '.join(late)} gave no sign of life", "its process is stopped, blocked or out of reach")
        elif late:
            self._end("a collective did not end", "another rank hangs within it, or has died")
        elif now - self._somebody_worked > self._limit and self._progress.waiting:
            # A silent one is named instead, when its time is over.
            if now - min(self._heard.values()) < _LATE * self._tick:
                self._end("all ranks waited for one another", "the ranks do different things")
        elif now - self._somebody_worked > self._limit:
            self._end(f"{self._world.name(self._world.rank)} did nothing", "its main thread is blocked")

    def _send(self, now: float) -> None:
        waits = self._progress.waiting
        if not self._pulse.beats() and not waits:
            return
        if not waits:
            self._somebody_worked = now
        for rank, sent in self._sent.items():
            if sent.Test():  # else this peer takes nothing: one message waits for it already
                self._sent[rank] = self._comm.Isend([_WAITS if waits else _WORKS, MPI.BYTE], dest=rank)

    def _receive(self, now: float) -> None:
        status, heartbeat = MPI.Status(), np.empty(1, dtype=np.uint8)
        while self._comm.Iprobe(source=MPI.ANY_SOURCE, status=status):
            self._comm.Recv([heartbeat, MPI.BYTE], source=status.source)
            self._heard[status.source] = now
            if heartbeat[0] == _WORKS[0]:
                self._somebody_worked = now

    def _end(self, what: str, why: str) -> None:
        what = f"{what} for {self._limit:g} s while a request ran"
        end_process(
            ReplicaFailed(what, where=self._world.name(self._world.rank), why=why, next=_NEXT), self._last_words
        )
