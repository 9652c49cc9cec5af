"""What becomes of a request whose worker was lost while it held it: queued again, or ended, with the reason."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from nnsight_hpc.daemon import table
from nnsight_hpc.daemon.backlog import HELD
from nnsight_hpc.daemon.refusals import needs_error
from nnsight_hpc.daemon.story import tell_of
from nnsight_hpc.wire.errors import ReplicaFailed
from nnsight_hpc.wire.states import EndCause, RequestState

if TYPE_CHECKING:
    import sqlite3

    from nnsight_hpc.daemon.table import Row
    from nnsight_hpc.wire.errors import HpcError

_Q = RequestState
_MOST_KILLS = 2
_GROWTH = 1.5
"""A request that was cut off is taken to need so much more than it had."""
_WHOLE = 0.9
"""One that had so much of all that a replica can give has had its chance. The rest is for loads that take longer."""


class Loss(NamedTuple):
    """How a worker was lost, how often a request may be tried, and how long one can take at most in its pool (seconds).

    `listened` is since when this daemon has listened to workers: of what began before it, nobody knows how long it ran.
    `company`: others shared the forward, and it may have been one of them that ended the worker.
    """

    why: str
    cause: EndCause
    attempts: int
    longest: float
    listened: float
    company: bool = False


def lose(connection: sqlite3.Connection, row: Row, loss: Loss) -> Row:
    """The row as it is after its worker was lost; what has ended, or is queued already, stays as it is."""
    if row.state not in HELD:
        return row
    if row.cancel:
        return table.move_to(connection, row, _Q.CANCELLED)
    running = row.state == _Q.RUNNING
    ran = time.time() - row.times[_Q.RUNNING] if running else 0.0
    killed = running and not loss.cause.blameless and not loss.company
    batch = "" if running else row.batch  # from now on it runs alone, so that it is known which one it was
    row = table.update(connection, row, kills=row.kills + killed, needs=_needs(row, loss, ran), batch=batch)
    if error := _end(row, loss, ran):
        tell_of(connection, row, f"taken back: {loss.why}; it fails: {error.what}")
        return table.move_to(connection, row, _Q.FAILED, error=error.report())
    tell_of(connection, row, f"taken back: {loss.why}; queued again")
    return table.move_to(connection, row, _Q.QUEUED, note=f"queued again after attempt {row.attempt}: {loss.why}")


def _needs(row: Row, loss: Loss, ran: float) -> float:
    """What the request needs at least, as far as known now. It is a guess, so it stays within what a replica can give."""
    return max(row.needs, min(_GROWTH * ran, _WHOLE * loss.longest)) if _was_cut_off(row, loss) else row.needs


def _end(row: Row, loss: Loss, ran: float) -> HpcError | None:
    """Why the request is not tried again, if so."""
    if row.kills >= _MOST_KILLS:
        return ReplicaFailed(
            f"two replicas ended while they ran request {row.id}, and it is not tried again",
            where=f"pool {row.pool}, replica {row.replica}",
            why=loss.why,
            next=f"see the worker's log: `nnsight-hpc logs {row.pool} --replica {row.replica}`",
        )
    if _was_cut_off(row, loss) and ran >= _WHOLE * loss.longest:
        return needs_error(row.pool, _GROWTH * ran, loss.longest)
    if row.attempt - row.gave_way >= loss.attempts and not (row.kind == "dump" and loss.cause.blameless):
        return ReplicaFailed(
            f"request {row.id} was tried {row.attempt} times, and each time its worker was lost",
            where=f"pool {row.pool}, replica {row.replica}",
            why=loss.why,
            next=f"see the worker's log: `nnsight-hpc logs {row.pool}`",
        )
    return None


def _was_cut_off(row: Row, loss: Loss) -> bool:
    """Whether it is known to have run until then, for nothing; a dump goes on where it was."""
    ran = row.state == _Q.RUNNING and row.times[_Q.RUNNING] >= loss.listened
    return ran and loss.cause == EndCause.WALLTIME and row.kind != "dump"
