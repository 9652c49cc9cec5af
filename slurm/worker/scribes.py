"""The scribes of all ranks of a replica: rank 0 has them write one slice together, each its own files.

Nothing but a few words travels between them: which files are whose follows from the slice's plan, and the values are on
every rank. Rank 0 begins a slice before the others, and commits it once all have sealed their files and said so.
"""

from __future__ import annotations

import enum
from collections import Counter
from typing import TYPE_CHECKING, Any

from nnsight_hpc.slurm.worker.scribe import Sealed
from nnsight_hpc.slurm.worker.slice_work import SliceWork
from nnsight_hpc.wire.messages import decode, encode

if TYPE_CHECKING:
    from nnsight_hpc.parallel import Lockstep
    from nnsight_hpc.slurm.worker.scribe import OwnScribe


class Order(enum.IntEnum):
    """What all ranks are to do; the first byte of what they are sent."""

    BEGIN = 0
    SEAL = 1
    PUBLISH = 2
    CLOSE = 3


class Scribes:
    """On rank 0 a `Scribe`, of which each call is one of all ranks. What fails on one of them is one error.

    Parameters
    ----------
    handler
        The number, among the handlers of `lockstep`, of `obey`.
    """

    def __init__(self, lockstep: Lockstep[Any], own: OwnScribe, handler: int) -> None:
        self._lockstep, self._own, self._handler = lockstep, own, handler

    def begin(self, work: SliceWork) -> None:
        self._lead(Order.BEGIN, encode(work))

    def seal(self) -> Sealed:
        sealed: list[Sealed] = self._lead(Order.SEAL)
        entries, overflows = [], Counter[str]()
        for one in sealed:
            entries += one.entries
            overflows.update(one.overflows)
        return Sealed(entries, dict(overflows))

    def publish(self) -> None:
        self._own.publish()  # before the others: the first file is here, and is gone where the slice was taken over
        self._lead(Order.PUBLISH)

    def close(self) -> None:
        self._lead(Order.CLOSE)

    def obey(self, payload: memoryview) -> list[Sealed] | None:
        """What each rank does when rank 0 leads an order."""
        order = Order(payload[0])
        if order is Order.BEGIN:
            self._own.begin(decode(bytes(payload[1:]), SliceWork, what="a slice's work"))
        elif order is Order.SEAL:
            return self._lockstep.gather(self._own.seal())
        elif order is Order.CLOSE:
            self._own.close()
        elif not self._lockstep.leads:  # who does has published
            self._own.publish()
        return None

    def _lead(self, order: Order, body: bytes = b"") -> Any:
        return self._lockstep.lead(bytes([order]) + body, handler=self._handler)
