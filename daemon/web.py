"""What both HTTP interfaces share: bodies in, messages out, and query parameters that are checked."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from aiohttp import web

from nnsight_hpc.wire.errors import InvalidInput
from nnsight_hpc.wire.files import replacing
from nnsight_hpc.wire.http import FRAME, JSON
from nnsight_hpc.wire.messages import decode, encode

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import msgspec

T = TypeVar("T")

MESSAGE_BYTES = 1 << 20
"""The largest JSON message; frames are received by `store_body`."""
LONGEST_WAIT = 60.0
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
    """A file's bytes, sent by the kernel; honours Range."""
    return web.FileResponse(path, headers={"Content-Type": FRAME}, chunk_size=_BLOCK)


def number(request: web.Request, name: str, *, default: float, most: float) -> float:
    given = request.query.get(name)
    try:
        value = default if given is None else float(given)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise InvalidInput(f"{name}={given} is not a number of at least 0", where=request.path)
    return min(value, most)


def required(request: web.Request, name: str) -> str:
    value = request.query.get(name)
    if not value:
        raise InvalidInput(f"{request.path} needs {name}=…")
    return value


async def store_body(request: web.Request, path: Path, most: int) -> None:
    """Write the body to `path`, on disk (fsync) when this returns, without holding it; refused beyond `most` bytes."""
    if (request.content_length or 0) > most:
        raise _too_large(most)
    writing = replacing(path)
    file = await asyncio.to_thread(writing.__enter__)
    try:
        await _copy_body(request, file, most)
    except BaseException as error:
        await asyncio.to_thread(writing.__exit__, type(error), error, error.__traceback__)
        raise
    await asyncio.to_thread(writing.__exit__, None, None, None)


async def _copy_body(request: web.Request, file: BinaryIO, most: int) -> None:
    written = 0
    async for block in request.content.iter_chunked(_BLOCK):
        written += len(block)
        if written > most:
            raise _too_large(most)
        await asyncio.to_thread(file.write, block)


async def skip_body(request: web.Request) -> None:
    """Read what nobody needs, so that a client that still sends gets its answer instead of a closed connection."""
    async for _ in request.content.iter_chunked(_BLOCK):
        pass


def _too_large(most: int) -> InvalidInput:
    return InvalidInput(f"the request is larger than {most} bytes, the most that this daemon takes")
