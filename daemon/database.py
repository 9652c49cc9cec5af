"""The file of the daemon's database: each epoch has one of its own.

The next daemon copies the newest, with its journal when its owner was killed in the middle of a commit, under a name that
nobody takes for a database until the copy is whole.
"""

from __future__ import annotations

import logging
import re
import shutil
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

from nnsight_hpc.daemon.schema import MIGRATIONS
from nnsight_hpc.wire.errors import CorruptData, HpcError, Incompatible
from nnsight_hpc.wire.files import sync_folder

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from nnsight_hpc.wire.places import Places

logger = logging.getLogger(__name__)

_DATABASE = re.compile(r"daemon-(\d+)\.sqlite")
_KEPT = 2
"""Databases of so many earlier epochs stay, for a person who needs to look."""


def connect(path: Path) -> sqlite3.Connection:
    """Open a database for this process alone, in rollback-journal mode, each commit on disk before it returns."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=256)
    connection.row_factory = sqlite3.Row
    for pragma in ("locking_mode = EXCLUSIVE", "journal_mode = TRUNCATE", "synchronous = FULL"):
        connection.execute(f"PRAGMA {pragma}")
    return connection


def take_over(places: Places, epoch: int) -> Path:
    """Make the database of `epoch` from the newest earlier one, or an empty one; the file is complete or not there.

    Raises `Incompatible` when a newer version of this program wrote it, `CorruptData` when SQLite finds it damaged.
    """
    copy = places.home / f"daemon-{epoch}.copy"
    journal = _journal(copy)
    _remove(copy)
    earlier = [places.database(epoch) for epoch in _databases(places.home)]
    try:
        if earlier:
            if _journal(earlier[-1]).exists():
                shutil.copyfile(_journal(earlier[-1]), journal)
            shutil.copyfile(earlier[-1], copy)
        _migrate(copy)
    except BaseException as error:
        _remove(copy)
        if isinstance(error, sqlite3.OperationalError):
            raise unwritable(copy, error) from None
        if isinstance(error, sqlite3.DatabaseError):
            raise _damaged(earlier, str(error)) from None
        raise
    journal.unlink(missing_ok=True)  # its work is done, and the copy gets another name
    copy.chmod(0o600)
    copy.replace(places.database(epoch))
    sync_folder(places.home)
    for old in earlier[:-_KEPT]:
        _remove(old)
    return places.database(epoch)


def _migrate(path: Path) -> None:
    """Roll back an unfinished commit, check the file, and bring its schema up to date."""
    with closing(connect(path)) as connection:
        if (found := connection.execute("PRAGMA quick_check").fetchone()[0]) != "ok":
            raise sqlite3.DatabaseError(found)
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version > len(MIGRATIONS):
            raise Incompatible(
                "a newer version of nnsight-hpc wrote the daemon's database",
                where=str(path),
                why=f"its schema has version {version}, this program knows {len(MIGRATIONS)}",
                next="use the newer version",
            )
        connection.execute("BEGIN")
        for statement in (statement for migration in MIGRATIONS[version:] for statement in migration):
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        connection.execute("COMMIT")


def _damaged(databases: Sequence[Path], why: str) -> CorruptData:
    """The newest of these cannot be read: what its owner can do, with the one before it or without one."""
    *_, newest = databases
    aside = f"mv {newest} {newest}.damaged"
    if len(databases) > 1:
        advice = (
            f"go back to the one before it: {aside} && cp {databases[-2]} {newest}; what was asked since is forgotten"
        )
    else:
        advice = f"begin with an empty queue: {aside}; `nnsight-hpc gc` then finds jobs that nobody knows"
    return CorruptData("the daemon's database is damaged", where=str(newest), why=why, next=advice)


def unwritable(path: Path, error: sqlite3.Error) -> HpcError:
    """The database cannot be written: what its owner can look at."""
    logger.error("cannot write %s: %s", path, error)
    return HpcError(
        "the daemon cannot write its database",
        where=str(path),
        why=str(error),
        next="look whether the file system is full, over your quota or read-only, and try again",
    )


def _remove(database: Path) -> None:
    _journal(database).unlink(missing_ok=True)
    database.unlink(missing_ok=True)


def _journal(database: Path) -> Path:
    return database.with_name(f"{database.name}-journal")


def _databases(home: Path) -> list[int]:
    return sorted(int(found[1]) for path in home.iterdir() if (found := _DATABASE.fullmatch(path.name)))
