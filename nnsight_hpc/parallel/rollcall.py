"""Every rank learns what every rank has to say, or all learn which ranks did not come: an all-gather with a time limit.

Collectives of MPI wait for ever for a rank that never arrives. Here each rank sends its answer to rank 0, which waits
only so long, and then tells all who came either all answers or who is missing. It is for the checks at the start: two small
messages a rank, milliseconds.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from nnsight_hpc.parallel.mpi import MPI
from nnsight_hpc.wire.errors import Unreachable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_ANSWER, _VERDICT = 1, 2
_GRACE = 5.0
"""Seconds that the others wait longer than rank 0, so that they hear its verdict."""
_WHY = "the process hangs, has ended, or was never started"
_NEXT = (
    "look for the missing ranks' last lines in the replica's log; nodes that are slow to start need a longer time limit"
)


def roll_call(comm: MPI.Intracomm, answer: object, names: Sequence[str], timeout: float, occasion: str) -> list[Any]:
    """The answers of all ranks, in the order of ranks; the same on all.

    Parameters
    ----------
    answer
        What this rank has to say: anything that pickles.
    names
        What to call each rank in an error.
    timeout
        Seconds that rank 0 waits for the others.
    occasion
        What the ranks were to do, for the error.

    Raises
    ------
    Unreachable
        Some ranks did not answer in time; raised on all that did.
    """
    if comm.rank == 0:
        answers, missing = _collect(comm, answer, timeout)
    else:
        sent = comm.isend(answer, dest=0, tag=_ANSWER)
        if not within(timeout + _GRACE, lambda: comm.iprobe(source=0, tag=_VERDICT)):
            what = f"{names[0]} did not answer within {timeout + _GRACE:.3g} s"
            raise Unreachable(what, where=f"{names[comm.rank]}, {occasion}", why=_WHY, next=_NEXT)
        answers, missing = comm.recv(source=0, tag=_VERDICT)
        sent.wait()
    if missing:
        came = [f"{names[rank]}: {said}" for rank, said in enumerate(answers) if rank not in missing]
        raise Unreachable(
            f"{', '.join(names[rank] for rank in missing)} of {comm.size} did not answer within {timeout:.3g} s",
            where=occasion,
            why="\n".join([f"{_WHY}; these answered:", *came]),
            next=_NEXT,
        )
    return answers


def _collect(comm: MPI.Intracomm, answer: object, timeout: float) -> tuple[list[Any], list[int]]:
    """What came in time (None where nothing came) and which ranks are missing, as all who came are told."""
    answers: dict[int, Any] = {0: answer}
    status = MPI.Status()

    def complete() -> bool:
        while len(answers) < comm.size and comm.iprobe(source=MPI.ANY_SOURCE, tag=_ANSWER, status=status):
            answers[status.source] = comm.recv(source=status.source, tag=_ANSWER)
        return len(answers) == comm.size

    within(timeout, complete)
    verdict = [answers.get(rank) for rank in range(comm.size)], [r for r in range(comm.size) if r not in answers]
    MPI.Request.waitall([comm.isend(verdict, dest=rank, tag=_VERDICT) for rank in answers if rank])
    return verdict


def within(timeout: float, done: Callable[[], bool]) -> bool:
    """Whether `done` came true within `timeout` seconds; asked 2000 times a second."""
    end = time.monotonic() + timeout
    while not done():
        if time.monotonic() > end:
            return False
        time.sleep(0.0005)
    return True
