"""The word: what the ranks of a communicator tell one another before each collective, in one all-reduce of three integers.

It carries how things are (the worst of all ranks counts) and what the rank is about to do. A rank whose peers are about to
do something else would wait for them for ever, or corrupt memory; with the word, all of them know it at the same moment.

A word costs 3 us between two ranks of a node (an MPI_Iallreduce; MPI_Allreduce would take 2, but MPI does not let the two
match, and a rank that has failed must post its word to several communicators at once).
"""

from __future__ import annotations

import time
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from nnsight_hpc.parallel.mpi import MPI

if TYPE_CHECKING:
    from nnsight_hpc.parallel.progress import Progress

_SPIN = 0.05
"""Seconds of waiting in which a rank does nothing else; after that it sleeps between looks, and leaves the core to others."""
_NAP = 0.0001


class Word(IntEnum):
    """How a rank is; the highest of all ranks counts."""

    FINE = 0
    CANCELLED = 1
    TIME_LIMIT = 2
    FAILED = 3
    APART = 4


class Operation(IntEnum):
    """What a rank is about to do."""

    END = 0
    ALL_REDUCE = 1
    ALL_GATHER = 2
    REDUCE_SCATTER = 3
    BROADCAST = 4
    ALL_TO_ALL = 5
    SCATTER = 6
    GATHER = 7
    REDUCE = 8
    BARRIER = 9
    PAYLOAD = 10


class Step(NamedTuple):
    """An operation that all ranks must enter alike.

    Attributes
    ----------
    length
        In elements; 0 where ranks may differ in it.
    group
        A number of the communicator that it uses, among those that share a channel.
    """

    operation: Operation
    length: int = 0
    itemsize: int = 0
    group: int = 0

    def __str__(self) -> str:
        name = self.operation.name.lower().replace("_", "-")
        if self.operation is Operation.END:
            return "the end of the request"
        return f"{name} of {self.length} x {self.itemsize} bytes" if self.length else name

    def signature(self) -> int:
        """A number for comparing steps over ranks, below 2**31. (Python's hash of a string differs between processes.)"""
        return (((self.operation * 1_000_003 + self.length) * 31 + self.itemsize) * 127 + self.group) & 0x7FFFFFFF


class Channel:
    """The words of one communicator, on a duplicate of it. Used by one thread at a time."""

    def __init__(self, comm: MPI.Intracomm, progress: Progress) -> None:
        self._comm, self._progress = comm.Dup(), progress
        self._mine, self._all = np.zeros(3, dtype=np.int32), np.zeros(3, dtype=np.int32)
        self._send, self._receive = [self._mine, 3, MPI.INT32_T], [self._all, 3, MPI.INT32_T]

    def exchange(self, word: Word, step: Step) -> Word:
        """Post a word and wait for the others'; APART when all are fine, but about to do different things."""
        if self._comm.size == 1:
            return word
        request = self.post(word, step)
        self.wait(request)
        heard, highest, lowest = self._all.tolist()
        if heard == Word.FINE and highest != -lowest:
            return Word.APART
        return Word(heard)

    def post(self, word: Word, step: Step) -> MPI.Request:
        """Post a word without waiting. The request must be waited for before the next word."""
        signature = step.signature()
        self._mine[:] = word, signature, -signature
        with self._progress.lock:
            return self._comm.Iallreduce(self._send, self._receive, op=MPI.MAX)

    def wait(self, request: MPI.Request) -> None:
        """Wait for a posted word, giving way to other threads and, when it takes long, to other processes."""
        lock, test = self._progress.lock, request.Test
        with lock:
            if test():
                return
        self._progress.waiting = True
        try:
            patience = time.monotonic() + _SPIN
            while True:
                with lock:
                    if test():
                        return
                if time.monotonic() > patience:
                    time.sleep(_NAP)
        finally:
            self._progress.waiting = False

    def close(self) -> None:
        """Free the communicator; collective."""
        self._comm.Free()
