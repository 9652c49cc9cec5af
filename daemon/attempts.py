"""An attempt at a request, from the moment it is given to a worker: each step within a transaction of the caller."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from nnsight_hpc.daemon import small, table
from nnsight_hpc.daemon.shares import charge
from nnsight_hpc.daemon.story import tell_of
from nnsight_hpc.wire.errors import Conflict
from nnsight_hpc.wire.states import RequestState
from nnsight_hpc.wire.workers import Lease

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable

    from nnsight_hpc.daemon.holdings import Held
    from nnsight_hpc.daemon.request_files import RequestFiles
    from nnsight_hpc.daemon.shares import Usage
    from nnsight_hpc.daemon.table import Row
    from nnsight_hpc.wire.messages import DumpProgress
    from nnsight_hpc.wire.workers import Begun, Outcome

_Q = RequestState


class Given(NamedTuple):
    """A request, as it is once it was given to a worker, and its bytes where it is small."""

    row: Row
    frame: bytes

    def is_with(self, replica: str) -> bool:
        """Whether this replica has it, and has not begun."""
        return self.row.state == _Q.LEASED and self.row.replica == replica


def hand_out(connection: sqlite3.Connection, requests: Iterable[str], replica: str) -> list[Given]:
    """Give those that are queued still to a replica; all of them that there are, as they are now."""
    rows = [row for request in requests if (row := table.find(connection, request))]
    return given(connection, [_hand_out(connection, row, replica) if table.waits(row) else row for row in rows])


def given(connection: sqlite3.Connection, rows: Iterable[Row]) -> list[Given]:
    """These, which have been given to a worker."""
    return [Given(row, small.body(connection, row)) for row in rows]


def _hand_out(connection: sqlite3.Connection, row: Row, replica: str) -> Row:
    row = table.move_to(connection, row, _Q.LEASED, replica=replica, attempt=row.attempt + 1)
    tell_of(connection, row, f"given to a worker, attempt {row.attempt}")
    return row


def lease_of(given: Given, files: RequestFiles, result_bytes: int | None) -> Lease:
    """What its worker is told of it; `result_bytes`: how large its result may be."""
    row = given.row
    return Lease(
        id=row.id,
        kind=row.kind,
        attempt=row.attempt,
        request=str(files.request(row.id)),
        result=str(files.result(row.id, row.attempt)),
        user=row.user,
        result_bytes=result_bytes,
        batch=row.batch,
        frame=given.frame,
    )


def begin(connection: sqlite3.Connection, begun: Iterable[Begun], replica: str) -> list[Row]:
    """Those that run now; what the replica was not given is left out."""
    rows = []
    for one in begun:
        row = table.find(connection, one.id)
        if row is not None and row.state == _Q.LEASED and (row.replica, row.attempt) == (replica, one.attempt):
            rows.append(table.move_to(connection, row, _Q.RUNNING))
            tell_of(connection, row, "it runs")
    return rows


class Fresh(NamedTuple):
    """The end of an attempt that has said nothing, with its result, before it is on disk."""

    row: Row
    result: bytes


class End(NamedTuple):
    """A request whose attempt has ended, and what its user has had with it; None where that was known already."""

    row: Row
    usage: Usage | None = None


def end(
    connection: sqlite3.Connection, replica: str, outcome: Outcome, progress: DumpProgress | None, half_life: float
) -> End:
    """Write down how an attempt ended. Raises `Conflict` where it does not count any more.

    Parameters
    ----------
    progress
        How far a dump was when it was last heard of.
    """
    row = held_by(connection, outcome.id, replica, outcome.attempt)
    if row.state.ended:
        return End(row)
    if row.state == _Q.QUEUED:  # taken back while its worker was silent, and not given to another yet
        if outcome.gave_way:
            return End(row)
        row = table.move_to(connection, row, _Q.LEASED)
    progress = progress or row.progress
    usage = charge(connection, row.user, outcome.seconds, half_life)
    if outcome.gave_way and not row.cancel:
        return End(_give_way(connection, row, progress), usage)
    row = table.move_to(
        connection,
        row,
        _end_state(outcome),
        error=outcome.error,
        result_bytes=len(outcome.result) or outcome.result_bytes,
        progress=progress and _end_progress(outcome, progress),
    )
    if outcome.result and row.state == _Q.COMPLETED:
        small.keep_result(connection, row, outcome.result)
    tell_of(connection, row, f"{row.state.lower()}{f': {outcome.error.what}' if outcome.error else ''}")
    return End(row, usage)


def charge_lost(
    connection: sqlite3.Connection, row: Row, held: Held, half_life: float, listened: float
) -> Usage | None:
    """Count what a request has run whose worker was lost; of the time in which nobody `listened`, nothing is known."""
    if row.state != _Q.RUNNING:
        return None
    ran = time.time() - max(row.times[_Q.RUNNING], listened)
    return charge(connection, row.user, held.share * max(0.0, ran), half_life)


def held_by(connection: sqlite3.Connection, request: str, replica: str, attempt: int) -> Row:
    row = table.get(connection, request)
    if (row.replica, row.attempt) != (replica, attempt):
        raise Conflict(
            f"attempt {attempt} of request {request} by replica {replica} does not count any more",
            why=f"it is {row.state}, attempt {row.attempt}" + (f" by replica {row.replica}" if row.replica else ""),
        )
    return row


def _give_way(connection: sqlite3.Connection, row: Row, progress: DumpProgress | None) -> Row:
    tell_of(connection, row, "it lets others go first; queued again")
    note = "it let others go first, and goes on where it was"
    return table.move_to(connection, row, _Q.QUEUED, progress=progress, gave_way=row.gave_way + 1, note=note)


def _end_progress(outcome: Outcome, progress: DumpProgress) -> DumpProgress:
    """Nobody writes any more; of what has completed all is written, whatever was heard last."""
    progress = msgspec.structs.replace(progress, speed=0.0, workers=0)
    if outcome.error is not None or outcome.cancelled:
        return progress
    return msgspec.structs.replace(
        progress,
        documents=progress.documents_total,
        tokens=progress.tokens_total,
        bytes=progress.bytes_total,
        seconds=outcome.seconds,
    )


def _end_state(outcome: Outcome) -> RequestState:
    if outcome.cancelled or outcome.gave_way:
        return _Q.CANCELLED
    return _Q.COMPLETED if outcome.error is None else _Q.FAILED
