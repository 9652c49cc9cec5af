"""Rank 0 hands work to the other ranks, and all run it at once.

Rank 0 talks to the world outside; each request that it leads is some bytes, which all ranks hand to the same function, so
that they call the same collectives in the same order. Which collectives it calls may not depend on the rank.

Followers wait by looking for a message and sleeping in between, since MPI's own waiting burns a core: under 2 % of a core,
and up to 5 ms until a request is noticed after a pause. A request is one small message to each follower, and a broadcast.
"""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import TYPE_CHECKING, Generic, Self, TypeVar

import numpy as np

from nnsight_hpc.parallel.mpi import MPI
from nnsight_hpc.parallel.words import Operation, Step
from nnsight_hpc.wire.errors import HpcError

if TYPE_CHECKING:
    from collections.abc import Callable

    from nnsight_hpc.parallel.guard import Guard, Stop
    from nnsight_hpc.parallel.world import World

T = TypeVar("T")
U = TypeVar("U")
_FIRST_NAP, _LONGEST_NAP, _GROWTH = 20e-6, 5e-3, 1.25
_PIECE = 2**30
_END = (-1, 0)
logger = logging.getLogger(__name__)


class Lockstep(Generic[T]):
    """One leader, rank 0, and its followers. Creating it is collective.

    On rank 0 it is a context manager that lets the followers go at the end.

    Parameters
    ----------
    handlers
        What all ranks can do with a request's bytes. The result is kept on rank 0 only.
    """

    def __init__(self, world: World, guard: Guard, *handlers: Callable[[memoryview], T]) -> None:
        self._world, self._guard, self._handlers = world, guard, handlers
        self._comm = world.comm.Dup()

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self._world.rank == 0

    def lead(
        self, payload: bytes | memoryview, stop: Callable[[], Stop | None] | None = None, *, handler: int = 0
    ) -> T:
        """Run a request on all ranks, to its result on this one. Rank 0 only; the others `follow`.

        Parameters
        ----------
        stop
            Asked at each word: why the request is to end now, if it is.
        handler
            Which of the handlers it is for.

        Raises
        ------
        HpcError
            Some rank failed, or the request was stopped; see `Guard.run`. The next request can be led.
        """
        self._announce(len(payload), handler)
        return self._guard.run(lambda: self._handlers[handler](self._share(memoryview(payload))), stop)

    def gather(self, answer: U) -> list[U]:
        """What each rank has to say, in the order of ranks; on the others than rank 0 nothing. Collective, in a handler.

        Parameters
        ----------
        answer
            What this rank has to say: anything small that pickles.
        """
        self._guard.before(Step(Operation.GATHER))
        with self._guard.progress.lock:
            return self._comm.gather(answer) or []

    def follow(self) -> None:
        """Run what rank 0 leads until it lets us go. What a request returns or raises is rank 0's to report."""
        while (following := self._next()) != _END:
            try:
                self._guard.run(partial(self._run, *following))
            except HpcError as error:
                logger.info("a request failed: %s", error.what)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.leads:
            self._announce(*_END)

    def _run(self, length: int, handler: int) -> None:
        self._handlers[handler](self._share(memoryview(bytearray(length))))

    def _share(self, payload: memoryview) -> memoryview:
        """Broadcast a request's bytes once all ranks have room for them."""
        self._guard.before(Step(Operation.PAYLOAD, payload.nbytes))
        for start in range(0, payload.nbytes, _PIECE):
            with self._guard.progress.lock:
                self._comm.Bcast([payload[start : start + _PIECE], MPI.BYTE])
        return payload.toreadonly()

    def _announce(self, length: int, handler: int) -> None:
        """Wake the followers."""
        header = np.array([length, handler], dtype=np.int64)
        with self._guard.progress.lock:
            for rank in range(1, self._world.size):
                self._comm.Send(header, dest=rank)

    def _next(self) -> tuple[int, int]:
        """Wait for the next request's length and handler, with naps that grow."""
        header, nap = np.empty(2, dtype=np.int64), _FIRST_NAP
        while not self._has_come():
            time.sleep(nap)
            nap = min(_GROWTH * nap, _LONGEST_NAP)
        with self._guard.progress.lock:
            self._comm.Recv(header, source=0)
        length, handler = header.tolist()
        return length, handler

    def _has_come(self) -> bool:
        with self._guard.progress.lock:
            return self._comm.Iprobe(source=0)
