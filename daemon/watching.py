"""The HTTP interface for those who watch the daemon: measurements, its own checks, and the description of the interface."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import web

from nnsight_hpc.daemon.checks import look
from nnsight_hpc.daemon.metrics import CONTENT_TYPE, measure
from nnsight_hpc.daemon.openapi import description
from nnsight_hpc.daemon.web import answer
from nnsight_hpc.wire.http import JSON

if TYPE_CHECKING:
    from nnsight_hpc.daemon.parts import Parts


class WatchingApi:
    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/metrics", self._metrics),
            web.get("/v1/checks", self._checks),
            web.get("/v1/openapi.json", self._openapi),
        ]

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=measure(self._parts).encode(), headers={"Content-Type": CONTENT_TYPE})

    async def _checks(self, _: web.Request) -> web.Response:
        return answer(await look(self._parts))

    async def _openapi(self, _: web.Request) -> web.Response:
        return web.Response(body=description(), content_type=JSON)
