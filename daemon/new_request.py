"""A request that has come, and how it gets into the queue."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec

from nnsight_hpc.daemon import small, table
from nnsight_hpc.daemon.refusals import check_dataset_is_free, check_own
from nnsight_hpc.daemon.story import tell_of
from nnsight_hpc.storage import dataset_folder
from nnsight_hpc.wire.messages import DumpSpec
from nnsight_hpc.wire.states import RequestState

if TYPE_CHECKING:
    import asyncio
    import sqlite3
    from pathlib import Path

    from nnsight_hpc.daemon.table import Row
    from nnsight_hpc.wire.errors import HpcError


class NewRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of it when it comes.

    `fingerprint` is that of the model its graph was made for, where given; `needs` how many seconds it takes at least, as
    far as its sender knows. Those with the same `batch`, if any, may share a forward, in which it has so many `tokens`.
    `digest` is that of its bytes, and `frame` are these where it is small; otherwise they are in a file.
    """

    id: str
    kind: str
    pool: str
    user: str
    received: float
    fingerprint: str = ""
    needs: float = 0.0
    dump: DumpSpec | None = None
    priority: int = 0
    batch: str = ""
    tokens: int = 0
    digest: str = ""
    frame: bytes = b""


class Accepted(NamedTuple):
    """The row of a request that has come; its sender may be told of it when that is `durable`, or why it never will be."""

    row: Row
    durable: asyncio.Future[Row]


def enqueue(connection: sqlite3.Connection, new: NewRequest, datasets: Path, refusal: HpcError | None) -> Row:
    """The row of a request that is queued now, or as it is where its id is known.

    Raises `refusal`, if there is one, where it is not known, `Conflict` where its dataset is there already, and `Denied`
    where the id is that of another user's request.
    """
    known = table.find(connection, new.id)
    if known is not None:
        check_own(f"request {new.id}", known.user, new.user)
        return known
    if refusal is not None:
        raise refusal
    if new.dump is not None:
        last = table.of_dataset(connection, new.dump.name)
        check_dataset_is_free(new.dump, last, dataset_folder(datasets, new.dump.name), new.user)
    row = table.insert(
        connection,
        id=new.id,
        kind=new.kind,
        pool=new.pool,
        state=RequestState.RECEIVED,
        user=new.user,
        times={RequestState.RECEIVED: new.received},
        fingerprint=new.fingerprint,
        dataset=new.dump.name if new.dump else "",
        dump=new.dump,
        needs=new.needs,
        priority=new.priority,
        batch=new.batch,
        tokens=new.tokens,
        digest=new.digest,
    )
    if new.frame:
        small.keep_body(connection, row, new.frame)
    tell_of(connection, row, f"queued for pool {row.pool} by {row.user}")
    return table.move_to(connection, row, RequestState.QUEUED)
