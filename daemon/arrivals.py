"""How a request comes in: its bytes to a file, checked, then its row, and only then the acknowledgement."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from nnsight_hpc.daemon.web import skip_body, store_body
from nnsight_hpc.wire.errors import Conflict, InvalidInput, NotFound, ReplicaFailed
from nnsight_hpc.wire.names import check_request_id

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from aiohttp import web

    from nnsight_hpc.daemon.config import Config
    from nnsight_hpc.daemon.requests import NewRequest, Requests
    from nnsight_hpc.wire.messages import RequestStatus

_REFUSALS = (Conflict, InvalidInput, NotFound, ReplicaFailed)


class Arrivals:
    """Receives frames, each id once, however often it is sent and also while it is still being sent."""

    def __init__(self, requests: Requests, config: Config) -> None:
        self._requests, self._config = requests, config
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def receive(
        self, http: web.Request, request: str, describe: Callable[[Path], Awaitable[NewRequest]]
    ) -> RequestStatus:
        """Store and queue the frame in the body of `http`, once `describe` has found nothing wrong with it."""
        check_request_id(request)
        lock = self._locks.setdefault(request, asyncio.Lock())
        async with lock:
            if await self._requests.find(request) is not None:
                await skip_body(http)
                return await self._requests.status(request)
            path = self._requests.request_file(request)
            await store_body(http, path, self._config.frame_bytes)
            try:
                return await self._requests.accept(await describe(path))
            except _REFUSALS:  # any other error may come after the row was written
                path.unlink(missing_ok=True)
                raise
