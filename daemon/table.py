"""Rows of the table `requests`: read, changed and moved from state to state, within a transaction of the caller."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import msgspec

from nnsight_hpc.daemon import small
from nnsight_hpc.wire.errors import ErrorReport, NotFound
from nnsight_hpc.wire.messages import DumpProgress, DumpSpec, encode
from nnsight_hpc.wire.states import RequestState, move

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Collection, Iterable

ENDED = tuple(state for state in RequestState if state.ended)


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
    needs: float = 0.0
    kills: int = 0
    priority: int = 0
    batch: str = ""
    tokens: int = 0
    gave_way: int = 0
    digest: str = ""
    ended: float = 0.0
    paused: bool = False


def move_to(connection: sqlite3.Connection, row: Row, to: RequestState, **changes: Any) -> Row:
    """Change the state, and the columns in `changes`, and note the time."""
    state, now = move(row.state, to, of=f"request {row.id}"), time.time()
    times = row.times if state == row.state else {**row.times, state: now}
    ended = {"ended": now} if state.ended else {}
    if state.ended:
        small.drop_body(connection, row)
    return update(connection, row, state=state, times=times, **ended, **changes)


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


def waits(row: Row) -> bool:
    """Whether it may be given to a worker."""
    return row.state == RequestState.QUEUED and not row.paused


def select(connection: sqlite3.Connection, where: str, *values: object, tail: str = "ORDER BY sequence") -> list[Row]:
    return [_of(found) for found in connection.execute(f"SELECT * FROM requests WHERE {where} {tail}", values)]  # noqa: S608 - names of columns


def page(
    connection: sqlite3.Connection,
    states: Iterable[RequestState],
    user: str | None,
    limit: int,
    before: int = 1 << 62,
) -> list[Row]:
    """The latest `limit` in one of these states that came before the one with that sequence; of all users where None.

    Each state is a range of an index, so that the costs are those of what is found.
    """
    where, mine = (
        ("state = ? AND sequence < ?", ()) if user is None else ("state = ? AND sequence < ? AND user = ?", (user,))
    )
    tail = f"ORDER BY sequence DESC LIMIT {limit}"
    found = [row for state in states for row in select(connection, where, state, before, *mine, tail=tail)]
    return sorted(found, key=lambda row: row.sequence)[-limit:]


def first(connection: sqlite3.Connection, where: str, *values: object) -> Row | None:
    rows = select(connection, where, *values, tail="ORDER BY sequence LIMIT 1")
    return rows[0] if rows else None


def ids(connection: sqlite3.Connection) -> set[str]:
    return {row[0] for row in connection.execute("SELECT id FROM requests")}


def find(connection: sqlite3.Connection, request: str) -> Row | None:
    return first(connection, "id = ?", request)


def get_all(connection: sqlite3.Connection, requests: Iterable[str]) -> list[Row]:
    return [get(connection, request) for request in requests]


def of_ids(connection: sqlite3.Connection, requests: Collection[str]) -> list[Row]:
    """Those of these that there are."""
    return select(connection, f"id IN ({', '.join('?' * len(requests))})", *requests)


def newest_of_datasets(connection: sqlite3.Connection) -> list[Row]:
    """The newest request of each dataset."""
    newest = "SELECT max(sequence) FROM requests WHERE dataset <> '' GROUP BY dataset"
    return select(connection, f"sequence IN ({newest})")


def of_dataset(connection: sqlite3.Connection, name: str) -> Row | None:
    rows = select(connection, "dataset = ? AND dataset <> ''", name, tail="ORDER BY sequence DESC LIMIT 1")
    return rows[0] if rows else None


def get(connection: sqlite3.Connection, request: str) -> Row:
    row = find(connection, request)
    if row is None:
        raise NotFound(f"there is no request {request}", next="`nnsight-hpc status` lists the requests")
    return row


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "state": RequestState,
    "times": msgspec.json.Decoder(dict[str, float]).decode,
    "cancel": bool,
    "paused": bool,
    "dump": lambda data: msgspec.json.decode(data, type=DumpSpec) if data else None,
    "error": lambda data: msgspec.json.decode(data, type=ErrorReport) if data else None,
    "progress": lambda data: msgspec.json.decode(data, type=DumpProgress) if data else None,
}


def _of(found: sqlite3.Row) -> Row:
    return Row(*(_DECODERS[name](found[name]) if name in _DECODERS else found[name] for name in Row.__struct_fields__))
