"""How a request is sent: under which id, and to which path at the daemon."""

from __future__ import annotations

import base64
import hashlib
from typing import TYPE_CHECKING
from urllib.parse import urlencode

from nnsight_hpc.wire.durations import seconds_of
from nnsight_hpc.wire.errors import InvalidInput
from nnsight_hpc.wire.messages import PRIORITIES, Hello
from nnsight_hpc.wire.names import check_name, new_request_id

if TYPE_CHECKING:
    from nnsight_hpc.wire.http import HttpClient


def request_path(
    request: str,
    pool: str | None,
    *,
    needs: str | None = None,
    exclusive: bool = False,
    priority: int = 0,
    digest: str = "",
    wait: float | None = None,
) -> str:
    """The path that a request is put to.

    Parameters
    ----------
    pool
        Where it is to run; None: the pool with the same weights.
    needs
        How long it runs at least (``10m``), where its sender knows.
    exclusive
        It shares no forward with other requests.
    priority
        Among the sender's own requests the larger goes first.
    digest
        Of what makes it the same request when its id is sent again; else that of all that is sent.
    wait
        Seconds that the answer may wait for what the request says, or for its end.

    Raises `InvalidInput` for what is no name, no duration, or no priority.
    """
    query = _query(pool, needs=needs, priority=priority, digest=digest)
    if exclusive:
        query["exclusive"] = "1"
    if wait is not None:
        query["wait"] = f"{wait:g}"
    return f"/v1/requests/{request}" + (f"?{urlencode(query)}" if query else "")


def dump_path(
    name: str,
    request: str,
    pool: str | None,
    *,
    needs: str | None = None,
    priority: int = 0,
    digest: str = "",
) -> str:
    """The path that a dump is put to which is to write the dataset `name`; the rest is as for `request_path`."""
    query = _query(pool, needs=needs, priority=priority, digest=digest)
    return f"/v1/datasets/{name}?{urlencode({'request': request, **query})}"


def _query(pool: str | None, *, needs: str | None, priority: int, digest: str) -> dict[str, str]:
    query = {"pool": check_name(pool, of="pool")} if pool else {}
    if needs is not None:
        query["needs"] = f"{seconds_of(needs, key='needs'):g}"
    if priority not in PRIORITIES:
        raise InvalidInput(
            f"priority cannot be {priority!r}", next=f"give a whole number from {PRIORITIES[0]} to {PRIORITIES[-1]}"
        )
    if priority:
        query["priority"] = str(int(priority))
    if digest:
        query["digest"] = digest
    return query


def request_id(daemon: HttpClient, idempotency_key: str | None) -> str:
    """A fresh id; under a key always the same for the same user of that daemon, in whatever process or on whatever machine.

    The daemon takes each id once, so what is sent again under its key is the request that is there already, and other
    content under the same key is refused.
    """
    if idempotency_key is None:
        return new_request_id()
    if not idempotency_key:
        raise InvalidInput(
            "an idempotency key cannot be empty", next="name what is to be done once, as sweep-3/prompt-17"
        )
    user = daemon.get("/v1/hello", Hello).user
    digest = hashlib.sha256(f"{user}\0{idempotency_key}".encode()).digest()
    return f"r-{base64.b32encode(digest).decode().lower()[:12]}"
