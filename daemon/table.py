"""Rows of the table `requests`: read, changed and moved from state to state, within a transaction of the caller."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import msgspec

from nnsight_hpc.wire.errors import ErrorReport, NotFound
from nnsight_hpc.wire.messages import DumpProgress, DumpSpec, encode
from nnsight_hpc.wire.states import RequestState, move

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable

_SHOWN_ENDED = 100


class Row(msgspec.Struct, frozen=True):
    """One row of the table `requests`."""

    sequence: int
    id: str
    kind: str
    pool: str
    state: RequestState
    user: str
    times: dict[str, float]
    fingerprint: str
    dataset: str
    dump: DumpSpec | None
    attempt: int
    replica: str
    cancel: bool
    error: ErrorReport | None
    result_bytes: int
    progress: DumpProgress | None
    note: str


def move_to(connection: sqlite3.Connection, row: Row, to: RequestState, **changes: Any) -> Row:
    """Change the state, and the columns in `changes`, and note the time."""
    state = move(row.state, to, of=f"request {row.id}")
    times = row.times if state == row.state else {**row.times, state: time.time()}
    return update(connection, row, state=state, times=times, **changes)


def insert(connection: sqlite3.Connection, **columns: Any) -> Row:
    names, marks = ", ".join(columns), ", ".join("?" * len(columns))
    values = [_column(value) for value in columns.values()]
    connection.execute(f"INSERT INTO requests ({names}) VALUES ({marks})", values)  # noqa: S608 - names of columns
    return get(connection, columns["id"])


def update(connection: sqlite3.Connection, row: Row, **changes: Any) -> Row:
    columns = ", ".join(f"{name} = ?" for name in changes)
    values = [_column(value) for value in changes.values()]
    connection.execute(f"UPDATE requests SET {columns} WHERE sequence = ?", (*values, row.sequence))  # noqa: S608 - names of columns
    return msgspec.structs.replace(row, **changes)


def _column(value: Any) -> Any:
    if isinstance(value, dict):
        return _json(value)
    if isinstance(value, msgspec.Struct):
        return encode(value)
    return b"" if value is None else value


def _json(value: dict[str, float]) -> str:
    return msgspec.json.encode(value).decode()


def select(connection: sqlite3.Connection, where: str, *values: object, tail: str = "ORDER BY sequence") -> list[Row]:
    return [_of(found) for found in connection.execute(f"SELECT * FROM requests WHERE {where} {tail}", values)]  # noqa: S608 - names of columns


def select_shown(connection: sqlite3.Connection) -> list[Row]:
    ended = select(
        connection,
        "state NOT IN ('QUEUED', 'LEASED', 'RUNNING')",
        tail=f"ORDER BY sequence DESC LIMIT {_SHOWN_ENDED}",
    )
    active = select(connection, "state IN ('QUEUED', 'LEASED', 'RUNNING')")
    return sorted([*ended, *active], key=lambda row: row.sequence)


def first(connection: sqlite3.Connection, where: str, *values: object) -> Row | None:
    rows = select(connection, where, *values, tail="ORDER BY sequence LIMIT 1")
    return rows[0] if rows else None


def ids(connection: sqlite3.Connection) -> set[str]:
    return {row[0] for row in connection.execute("SELECT id FROM requests")}


def find(connection: sqlite3.Connection, request: str) -> Row | None:
    return first(connection, "id = ?", request)


def of_dataset(connection: sqlite3.Connection, name: str) -> Row | None:
    rows = select(connection, "dataset = ? AND dataset <> ''", name, tail="ORDER BY sequence DESC LIMIT 1")
    return rows[0] if rows else None


def get(connection: sqlite3.Connection, request: str) -> Row:
    row = find(connection, request)
    if row is None:
        raise NotFound(f"there is no request {request}", next="`nnsight-hpc status` lists the requests")
    return row


def with_position(connection: sqlite3.Connection, row: Row) -> tuple[Row, int | None]:
    """The row, and how many are before it in its pool's queue; None when it does not wait."""
    if row.state != RequestState.QUEUED:
        return row, None
    query = "SELECT count(*) FROM requests WHERE state = 'QUEUED' AND pool = ? AND sequence < ?"
    return row, connection.execute(query, (row.pool, row.sequence)).fetchone()[0]


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "state": RequestState,
    "times": msgspec.json.Decoder(dict[str, float]).decode,
    "cancel": bool,
    "dump": lambda data: msgspec.json.decode(data, type=DumpSpec) if data else None,
    "error": lambda data: msgspec.json.decode(data, type=ErrorReport) if data else None,
    "progress": lambda data: msgspec.json.decode(data, type=DumpProgress) if data else None,
}


def _of(found: sqlite3.Row) -> Row:
    return Row(*(_DECODERS[name](found[name]) if name in _DECODERS else found[name] for name in Row.__struct_fields__))
