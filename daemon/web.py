"""What both HTTP interfaces share: bodies in, messages out, and query parameters that are checked."""

from __future__ import annotations

import asyncio
import hashlib
import io
import re
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from aiohttp import web

from nnsight_hpc.wire.errors import InvalidInput
from nnsight_hpc.wire.files import replacing, write_atomically
from nnsight_hpc.wire.http import FRAME, JSON
from nnsight_hpc.wire.messages import LISTED, MOST_LISTED, PRIORITIES, decode, encode

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from pathlib import Path

    import msgspec
    from aiohttp.abc import AbstractStreamWriter

T = TypeVar("T")

MESSAGE_BYTES = 1 << 20
"""The largest JSON message; frames are received by `store_body`."""
LONGEST_WAIT = 60.0
_LONGEST_NEED = 1e9
LAST_BYTE = 1 << 62
"""No file has more."""
_BLOCK = 1 << 20


async def message(request: web.Request, as_type: type[T]) -> T:
    return decode(await request.read(), as_type, what=as_type.__name__)


def answer(message: msgspec.Struct | Sequence[msgspec.Struct] | None) -> web.Response:
    """A message, a list of messages, or null (no message) as JSON."""
    return web.Response(body=encode(message), content_type=JSON)  # type: ignore[arg-type]  # msgspec takes them all


def done() -> web.Response:
    return web.Response(body=b"{}", content_type=JSON)


def text(lines: str) -> web.Response:
    return web.Response(text=lines + "\n" if lines else "")


def file(path: Path) -> web.FileResponse:
    """A file's bytes, sent by the kernel; honours Range and If-Range."""
    return _File(path)


class _File(web.FileResponse):
    """Also knows entity tags in If-Range (RFC 9110, 13.1.5), where aiohttp knows dates only: for another one, all of it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, headers={"Content-Type": FRAME}, chunk_size=_BLOCK)
        self._file = path

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        tag = request.headers.get("If-Range", "")
        if tag.endswith('"') and tag != await asyncio.to_thread(_tag, self._file):
            headers = request.headers.copy()
            headers.popall("Range", None)
            request = request.clone(headers=headers)
        return await super().prepare(request)


def _tag(path: Path) -> str:
    """The entity tag that aiohttp gives a file."""
    status = path.stat()
    return f'"{status.st_mtime_ns:x}-{status.st_size:x}"'


def number(request: web.Request, name: str, *, default: float, most: float) -> float:
    given = request.query.get(name)
    try:
        value = default if given is None else float(given)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise InvalidInput(f"{name}={given} is not a number of at least 0", where=request.path)
    return min(value, most)


def needs_of(request: web.Request) -> float:
    """The seconds that a request takes at least, as far as its sender knows."""
    return number(request, "needs", default=0, most=_LONGEST_NEED)


def priority_of(request: web.Request) -> int:
    """Among its user's own requests; a larger one goes first."""
    given = request.query.get("priority", "0")
    if not re.fullmatch(r"-?\d{1,3}", given, re.ASCII) or int(given) not in PRIORITIES:
        raise InvalidInput(
            f"priority={given} is not a whole number from {PRIORITIES[0]} to {PRIORITIES[-1]}", where=request.path
        )
    return int(given)


def listed(request: web.Request) -> int:
    """How many requests a list is to have (of each kind, where it has several)."""
    return int(number(request, "limit", default=LISTED, most=MOST_LISTED))


def required(request: web.Request, name: str) -> str:
    value = request.query.get(name)
    if not value:
        raise InvalidInput(f"{request.path} needs {name}=…")
    return value


async def store_body(
    request: web.Request, path: Path, most: int, look: Callable[[BinaryIO], Awaitable[T]]
) -> tuple[T, str]:
    """Write the body to `path`, on disk (fsync) when this returns; what `look` makes of it, and its digest.

    The digest is a SHA-256, in hexadecimal digits. A small body is looked at while it is written; a large one is not held.
    One of more than `most` bytes is refused. What `look` raises leaves the file there.
    """
    if (request.content_length or 0) > most:
        raise _too_large(most)
    if request.content_length is not None and request.content_length < MESSAGE_BYTES:
        body = await request.read()
        storing = asyncio.ensure_future(asyncio.to_thread(_store, path, body))
        try:
            found = await look(io.BytesIO(body))
        finally:
            digest = await storing
        return found, digest
    digest = await _store_large(request, path, most)
    with await asyncio.to_thread(path.open, "rb") as file:
        return await look(file), digest


def _store(path: Path, body: bytes) -> str:
    write_atomically(path, body)
    return hashlib.sha256(body).hexdigest()


async def _store_large(request: web.Request, path: Path, most: int) -> str:
    writing = replacing(path)
    file = await asyncio.to_thread(writing.__enter__)
    try:
        digest = await _copy_body(request, file, most)
    except BaseException as error:
        await asyncio.to_thread(writing.__exit__, type(error), error, error.__traceback__)
        raise
    await asyncio.to_thread(writing.__exit__, None, None, None)
    return digest


async def _copy_body(request: web.Request, file: BinaryIO, most: int) -> str:
    written, digest = 0, hashlib.sha256()

    def write(block: bytes) -> None:
        digest.update(block)
        file.write(block)

    async for block in request.content.iter_chunked(_BLOCK):
        written += len(block)
        if written > most:
            raise _too_large(most)
        await asyncio.to_thread(write, block)
    return digest.hexdigest()


async def skip_body(request: web.Request) -> str:
    """Read what nobody needs, so that a client that still sends gets its answer instead of a closed connection.

    Its digest, as `store_body` gives it.
    """
    digest = hashlib.sha256()
    async for block in request.content.iter_chunked(_BLOCK):
        await asyncio.to_thread(digest.update, block)
    return digest.hexdigest()


def _too_large(most: int) -> InvalidInput:
    return InvalidInput(f"the request is larger than {most} bytes, the most that this daemon takes")
