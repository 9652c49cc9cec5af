"""Faults thrown into requests from outside: what a rank does is counted as it passes, and at a chosen place it fails.

A rank passes three kinds of places: the words of the guard (``word``: before each collective, before the request's bytes
and at its end), the nodes of the graph (``node``: an error there is an error of the operation), and on rank 0 the questions
whether the request is to stop, since it was cancelled (``cancel``) or its time is over (``limit``).
"""

from __future__ import annotations

import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from nnsight_hpc.parallel import Stop, Word
from nnsight_hpc.wire.errors import HpcError

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Mapping

    from nnsight_hpc.parallel import Guard
    from nnsight_hpc.slurm.worker.model import Member
    from nnsight_hpc.slurm.worker.ranks import Ranks

LIMIT = Stop(Word.TIME_LIMIT, HpcError("its time is over"))
CANCELLED = "the request was cancelled while it ran"


def raise_an_error() -> None:
    raise KeyError("a fault")


def run_out_of_gpu_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def run_out_of_memory() -> None:
    """What torch raises for the CPU's memory."""
    torch.empty(2**50)


def run_out_of_python_memory() -> None:
    bytearray(2**62)


KINDS: Mapping[Callable[[], None], str] = {
    raise_an_error: "KeyError: 'a fault'",
    run_out_of_gpu_memory: "CUDA out of memory",
    run_out_of_memory: "DefaultCPUAllocator",
    run_out_of_python_memory: "MemoryError",
}
"""What goes wrong, and what the user is told of it."""

Place = tuple[str, int]
"""A kind of places, and the how manieth of them."""


class Fault(NamedTuple):
    """What happens on a rank; the places ``cancel`` and ``limit`` take no `kind`."""

    rank: int
    place: Place
    kind: Callable[[], None] = raise_an_error


class Injector:
    """Between a rank's part of a model and its guard; counts the places of each request, and fails at those it is told.

    Attributes
    ----------
    passed
        Of the last request: for each kind, whether the place was in a backward pass.
    failed, ended
        When the fault struck, if it did, and when the request ended; on the clock that all processes of a machine share.
    """

    def __init__(self, ranks: Ranks, guard: Guard) -> None:
        self.passed: dict[str, list[bool]] = {}
        self.failed = self.ended = 0.0
        self._armed: Mapping[Place, Callable[[], None]] = {}
        self._run, self._before, self._part, self._lead = guard.run, guard.before, ranks._part.run, ranks._lockstep.lead
        self._guard, self._now = guard, self._armed
        guard.run, guard.before = self._guarded, self._word
        ranks._part.run, ranks._lockstep.lead = self._in_part, self._limited

    def arm(self, faults: Mapping[Place, Callable[[], None]]) -> None:
        """Let the next request fail at these places."""
        self._armed = faults
        self.failed = self.ended = 0.0

    def _guarded(self, function: Callable[[], Any], stop: Callable[[], Stop | None] | None = None) -> Any:
        self.passed = defaultdict(list)
        self._now, self._armed = self._armed, {}
        try:
            return self._run(function, stop)
        finally:
            self._now = {}
            self.ended = self.ended or time.monotonic()

    def _word(self, *step: Any) -> None:
        if self._guard.progress.running.is_set():
            self._pass("word")
        self._before(*step)

    def _in_part(self, member: Member) -> dict[str, Any]:
        """A node asks before it runs whether the request was cancelled: there an error is its operation's."""
        asked = member.cancelled

        def cancelled() -> bool:
            self._pass("node")
            return asked is not None and asked()

        return self._part(member._replace(cancelled=cancelled))

    def _limited(self, payload: memoryview, stop: Callable[[], Stop | None], **which: int) -> Any:
        return self._lead(payload, lambda: LIMIT if self.asked("limit") else stop(), **which)

    def asked(self, what: str) -> bool:
        """Whether it is now that the request is to stop."""
        self.passed[what].append(False)
        if (what, len(self.passed[what]) - 1) not in self._now:
            return False
        self._strikes()
        return True

    def _pass(self, what: str) -> None:
        self.passed[what].append(torch._C._current_graph_task_id() != -1)
        fail = self._now.get((what, len(self.passed[what]) - 1))
        if fail is not None:
            self._strikes()
            fail()

    def _strikes(self) -> None:
        self.failed = self.failed or time.monotonic()


def chosen(chance: random.Random, passed: list[Mapping[str, list[bool]]]) -> list[Fault]:
    """Some faults for a request of which is known what each rank passes when nothing happens to it."""
    ranks, how = range(len(passed)), chance.choice(("one", "one", "two", "all alike", "stop"))
    if how == "stop":
        what = chance.choice(("cancel", "limit"))
        return [Fault(0, (what, chance.randrange(len(passed[0][what]))))]
    if how == "all alike":
        place, kind = _place(chance, passed[0]), chance.choice([*KINDS])
        return [Fault(rank, place, kind) for rank in ranks]
    failing = chance.sample(ranks, 2 if how == "two" else 1)
    return [Fault(rank, _place(chance, passed[rank]), chance.choice([*KINDS])) for rank in failing]


def _place(chance: random.Random, passed: Mapping[str, list[bool]]) -> Place:
    """A word or a node; often before all collectives or after them, and in a backward pass where there is one."""
    if chance.random() < 0.3:
        return "word", chance.choice((0, len(passed["word"]) - 1))
    within = any(passed["word"]) and chance.random() < 0.5
    return chance.choice(
        [(what, n) for what in ("word", "node") for n, backward in enumerate(passed[what]) if backward >= within]
    )
