"""How a request comes in: its bytes are checked and stored, with its row where they are few, else in a file before it."""

from __future__ import annotations

import asyncio
import hashlib
import io
import re
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import msgspec

from nnsight_hpc.daemon.new_request import Accepted
from nnsight_hpc.daemon.refusals import check_own
from nnsight_hpc.daemon.web import skip_body, store_body
from nnsight_hpc.wire.errors import Conflict, Denied, InvalidInput, NotFound, ReplicaFailed
from nnsight_hpc.wire.names import check_request_id
from nnsight_hpc.wire.workers import SMALL_FRAME

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import BinaryIO, TypeAlias

    from aiohttp import web

    from nnsight_hpc.daemon.new_request import NewRequest
    from nnsight_hpc.daemon.parts import Parts
    from nnsight_hpc.daemon.table import Row

    _Describe: TypeAlias = Callable[[BinaryIO], Awaitable[NewRequest]]
    """What is known of a request by its bytes; raises what is wrong with it."""

_DIGEST = r"[0-9a-f]{64}"
"""A SHA-256."""
_REFUSALS = (Conflict, Denied, InvalidInput, NotFound, ReplicaFailed)


class Arrivals:
    """Receives frames, each id once, however often it is sent and also while it is still being sent."""

    def __init__(self, parts: Parts) -> None:
        self._requests, self._views, self._config = parts.requests, parts.views, parts.config
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def receive(self, http: web.Request, request: str, describe: _Describe) -> Row:
        """Store and queue the frame in the body of `http`, in a file, unless `describe` finds something wrong with it.

        Its row as it is then, or as it is where it was sent before; on disk, so that all may be told of it.
        """
        said, lock = self._checked(http, request)
        async with lock:
            accepted = await self._take_into_file(http, request, said, describe, waits=True)
        return await accepted.durable

    async def begin(self, http: web.Request, request: str, describe: _Describe, *, waits: bool) -> Accepted:
        """As `receive`, before it is on disk; the bytes of a small one are kept with its row. `waits`: its sender, for that."""
        said, lock = self._checked(http, request)
        async with lock:
            most = min(SMALL_FRAME, self._config.frame_bytes)
            if http.content_length is not None and http.content_length <= most:
                return await self._take_small(http, request, said, describe, waits=waits)
            return await self._take_into_file(http, request, said, describe, waits=waits)

    def _checked(self, http: web.Request, request: str) -> tuple[str, asyncio.Lock]:
        """The digest that its sender gives it, if any, and what is held while it comes in."""
        check_request_id(request)
        return _said_digest(http), self._locks.setdefault(request, asyncio.Lock())

    async def _take_small(
        self, http: web.Request, request: str, said: str, describe: _Describe, *, waits: bool
    ) -> Accepted:
        body = await http.read()
        digest = said or hashlib.sha256(body).hexdigest()
        try:
            new = await describe(io.BytesIO(body))
        except _REFUSALS:  # what was right when it came first may be wrong by now
            if known := await self._views.find(request):
                return _again(known, http["user"], digest)
            raise
        accepted = await self._requests.accept(msgspec.structs.replace(new, digest=digest, frame=body), waits=waits)
        _check_same(accepted.row, http["user"], digest)
        return accepted

    async def _take_into_file(
        self, http: web.Request, request: str, said: str, describe: _Describe, *, waits: bool
    ) -> Accepted:
        if known := await self._views.find(request):
            computed = await skip_body(http)
            return _again(known, http["user"], said or computed)
        path = self._requests.files.request(request)
        try:
            new, computed = await store_body(http, path, self._config.frame_bytes, describe)
            return await self._requests.accept(msgspec.structs.replace(new, digest=said or computed), waits=waits)
        except _REFUSALS:  # any other error may come after the row was written
            path.unlink(missing_ok=True)
            raise


def _again(known: Row, user: str, digest: str) -> Accepted:
    """A request that is on disk already."""
    _check_same(known, user, digest)
    durable: asyncio.Future[Row] = asyncio.get_running_loop().create_future()
    durable.set_result(known)
    return Accepted(known, durable)


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
