"""A request that ends before it has been run to its end: cancelled, failed, or expired, within a transaction of the caller."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nnsight_hpc.daemon import table
from nnsight_hpc.daemon.refusals import expired_error
from nnsight_hpc.daemon.story import tell_of
from nnsight_hpc.wire.errors import Conflict
from nnsight_hpc.wire.states import RequestState

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable

    from nnsight_hpc.daemon.table import Row
    from nnsight_hpc.wire.errors import HpcError

_Q = RequestState


def cancel(connection: sqlite3.Connection, request: str) -> Row:
    """End it while it is queued; otherwise note that its worker is to give it up. What has ended stays as it is."""
    row = table.get(connection, request)
    if row.state.ended:
        return row
    tell_of(connection, row, "somebody has cancelled it")
    if row.state == _Q.QUEUED:
        return table.move_to(connection, row, _Q.CANCELLED)
    return table.update(connection, row, cancel=True)


def pause(connection: sqlite3.Connection, request: str, *, paused: bool) -> Row:
    """Note that it is not to be given to a worker, and that one which has it is to stop; or the contrary.

    Raises `Conflict` where it has ended.
    """
    row = table.get(connection, request)
    if row.state.ended:
        raise Conflict(f"dump {row.dataset} has ended", where=f"request {row.id}", why=f"it is {row.state}")
    if row.paused == paused:
        return row
    tell_of(connection, row, "its user has paused it" if paused else "its user has it go on")
    return table.update(connection, row, paused=paused)


def refuse(connection: sqlite3.Connection, row: Row, error: HpcError) -> Row:
    """Fail a queued request that will never run."""
    tell_of(connection, row, f"failed: {error.what}")
    return table.move_to(connection, row, _Q.FAILED, error=error.report())


def expire(connection: sqlite3.Connection, requests: Iterable[str], limit: float) -> list[Row]:
    """End those of these that are queued, and have been since before `limit`."""
    waiting = [row for row in table.get_all(connection, requests) if row.state == _Q.QUEUED]
    return [_expire(connection, row) for row in waiting if row.times[_Q.QUEUED] < limit]


def _expire(connection: sqlite3.Connection, row: Row) -> Row:
    error = expired_error(row)
    tell_of(connection, row, error.what)
    return table.move_to(connection, row, _Q.EXPIRED, error=error.report())
