"""The HTTP interface for the dashboard: the files of its page, and what it shows, as soon as that has changed."""

from __future__ import annotations

import asyncio
from importlib.resources import files
from typing import TYPE_CHECKING

from aiohttp import web

from nnsight_hpc.daemon.changes import ANYTHING
from nnsight_hpc.daemon.dashboard import DashboardView
from nnsight_hpc.daemon.web import LONGEST_WAIT, answer, number
from nnsight_hpc.wire.dashboard import PAGE
from nnsight_hpc.wire.errors import NotFound
from nnsight_hpc.wire.http import FRAME

if TYPE_CHECKING:
    from nnsight_hpc.daemon.parts import Parts
    from nnsight_hpc.wire.dashboard import Dashboard

PACE = 1.0
"""Seconds between two looks for one who watches: what happens after a while of quiet is told at once, a stream of it not."""
_FOLDER = files("nnsight_hpc.daemon")


class DashboardApi:
    def __init__(self, parts: Parts) -> None:
        self._changes, self._view = parts.changes, DashboardView(parts)

    def routes(self) -> list[web.RouteDef]:
        return [web.get("/v1/dashboard", self._shown), web.get("/v1/dashboard/{page}", self._file)]

    async def _shown(self, request: web.Request) -> web.Response:
        seen, wait = request.query.get("seen", ""), number(request, "wait", default=0, most=LONGEST_WAIT)
        clock = asyncio.get_running_loop().time
        due = clock() + (PACE if seen and wait else 0.0)  # whoever has seen something was answered just now

        async def look() -> Dashboard:
            nonlocal due
            await asyncio.sleep(due - clock())
            due = clock() + PACE
            return await self._view.of(request["user"], owner=request["owner"])

        shown: Dashboard = await self._changes.wait(ANYTHING, look, lambda shown: shown.version != seen, wait)
        return answer(shown)

    async def _file(self, request: web.Request) -> web.Response:
        name = request.match_info["page"]
        if name not in PAGE:
            raise NotFound(f"the dashboard's page has no file {name}", why=f"its files are {', '.join(PAGE)}")
        return web.Response(body=(_FOLDER / name).read_bytes(), content_type=FRAME)
