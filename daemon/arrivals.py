"""How a request comes in: its bytes to a file, checked, then its row, and only then the acknowledgement."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import msgspec

from nnsight_hpc.daemon.refusals import check_own
from nnsight_hpc.daemon.web import skip_body, store_body
from nnsight_hpc.wire.errors import Conflict, Denied, InvalidInput, NotFound, ReplicaFailed
from nnsight_hpc.wire.names import check_request_id

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import BinaryIO

    from aiohttp import web

    from nnsight_hpc.daemon.new_request import NewRequest
    from nnsight_hpc.daemon.parts import Parts
    from nnsight_hpc.daemon.table import Row

_DIGEST = r"[0-9a-f]{64}"
"""A SHA-256."""
_REFUSALS = (Conflict, Denied, InvalidInput, NotFound, ReplicaFailed)


class Arrivals:
    """Receives frames, each id once, however often it is sent and also while it is still being sent."""

    def __init__(self, parts: Parts) -> None:
        self._requests, self._views, self._config = parts.requests, parts.views, parts.config
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def receive(
        self, http: web.Request, request: str, describe: Callable[[BinaryIO], Awaitable[NewRequest]]
    ) -> Row:
        """Store and queue the frame in the body of `http`, unless `describe` finds something wrong with it.

        Its row as it is then, or as it is where it was sent before.
        """
        check_request_id(request)
        said = _said_digest(http)
        lock = self._locks.setdefault(request, asyncio.Lock())
        async with lock:
            if known := await self._views.find(request):
                computed = await skip_body(http)
                _check_same(known, http["user"], said or computed)
                return known
            path = self._requests.files.request(request)
            try:
                new, computed = await store_body(http, path, self._config.frame_bytes, describe)
                return await self._requests.accept(msgspec.structs.replace(new, digest=said or computed))
            except _REFUSALS:  # any other error may come after the row was written
                path.unlink(missing_ok=True)
                raise


def _said_digest(http: web.Request) -> str:
    """What its sender says that the content is known by: bytes that say the same may differ, since they name his files."""
    said = http.query.get("digest")
    if said is None:
        return ""
    if not re.fullmatch(_DIGEST, said):
        raise InvalidInput("the query's digest is no SHA-256 in hexadecimal digits", where=http.path)
    return said


def _check_same(known: Row, user: str, digest: str) -> None:
    """Raise why what was sent with a known id is not that request, if so."""
    check_own(f"request {known.id}", known.user, user)
    if known.digest not in ("", digest):  # an earlier version of the daemon knew of none
        raise Conflict(
            f"request {known.id} was sent before with other content",
            next="choose another id, or another idempotency key",
        )
