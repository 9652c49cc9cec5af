"""The bytes of small requests and of small results, in the database beside their rows.

They come to the disk in the same commit as the row, where a file of its own would take two more calls that wait for it, and
they are of one epoch, as the row is. What is not small lies in files (`request_files`), and so do results that are old: the
next daemon copies the database.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import sqlite3

    from nnsight_hpc.daemon.table import Row


def keep_body(connection: sqlite3.Connection, row: Row, frame: bytes) -> None:
    connection.execute("INSERT INTO bodies VALUES (?, ?)", (row.sequence, frame))


def body(connection: sqlite3.Connection, row: Row) -> bytes:
    """The request's bytes; none where they lie in a file."""
    return _frame(connection, "SELECT frame FROM bodies WHERE sequence = ?", row)


def drop_body(connection: sqlite3.Connection, row: Row) -> None:
    """Nobody needs the bytes of a request that has ended."""
    connection.execute("DELETE FROM bodies WHERE sequence = ?", (row.sequence,))


def keep_result(connection: sqlite3.Connection, row: Row, frame: bytes) -> None:
    connection.execute("INSERT INTO results VALUES (?, ?)", (row.sequence, frame))


def result(connection: sqlite3.Connection, row: Row) -> bytes:
    """The request's result; nothing where it lies in a file, or there is none."""
    return _frame(connection, "SELECT frame FROM results WHERE sequence = ?", row)


def drop_result(connection: sqlite3.Connection, row: Row) -> None:
    """It lies in a file now, or is not kept any more."""
    connection.execute("DELETE FROM results WHERE sequence = ?", (row.sequence,))


def _frame(connection: sqlite3.Connection, query: str, row: Row) -> bytes:
    found = connection.execute(query, (row.sequence,)).fetchone()
    return b"" if found is None else bytes(found[0])
