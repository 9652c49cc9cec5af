"""The HTTP interface for people, on the Unix socket: the daemon itself. Who may do what is in `sharing.py`.

Pools are in `pools_api.py`, requests in `requests_api.py`, datasets in `datasets.py`, the models of pools in `models.py`, what
watches the daemon in `watching.py` and `dashboard_api.py`. All of it is described in `operations.py`.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from nnsight_hpc.daemon.arrivals import Arrivals
from nnsight_hpc.daemon.dashboard_api import DashboardApi
from nnsight_hpc.daemon.datasets import DatasetsApi
from nnsight_hpc.daemon.dumps_api import DumpsApi
from nnsight_hpc.daemon.errors import errors_as_reports
from nnsight_hpc.daemon.garbage import Collector
from nnsight_hpc.daemon.log_file import last_entries
from nnsight_hpc.daemon.logs import MOST_LINES
from nnsight_hpc.daemon.models import ModelsApi
from nnsight_hpc.daemon.pools_api import PoolsApi
from nnsight_hpc.daemon.requests_api import RequestsApi
from nnsight_hpc.daemon.sharing import keep_apart
from nnsight_hpc.daemon.watching import WatchingApi
from nnsight_hpc.daemon.web import MESSAGE_BYTES, answer, done, listed, number, text
from nnsight_hpc.wire.pools import Status

if TYPE_CHECKING:
    from nnsight_hpc.daemon.parts import Parts


def people_app(parts: Parts) -> web.Application:
    app = web.Application(middlewares=[errors_as_reports, keep_apart(parts)], client_max_size=MESSAGE_BYTES)
    arrivals, collector = Arrivals(parts), Collector(parts)
    app.add_routes(DaemonApi(parts, collector).routes())
    app.add_routes(PoolsApi(parts, collector).routes())
    app.add_routes(ModelsApi(parts).routes())
    app.add_routes(RequestsApi(parts, arrivals).routes())
    app.add_routes(DatasetsApi(parts, arrivals).routes())
    app.add_routes(DumpsApi(parts).routes())
    app.add_routes(WatchingApi(parts).routes())
    app.add_routes(DashboardApi(parts).routes())
    return app


class DaemonApi:
    """The daemon itself."""

    def __init__(self, parts: Parts, collector: Collector) -> None:
        self._parts, self._collector = parts, collector

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v1/hello", self._say_hello),
            web.get("/v1/status", self._status),
            web.get("/v1/log", self._log),
            web.post("/v1/gc", self._collect),
            web.post("/v1/stop", self._stop),
        ]

    async def _say_hello(self, request: web.Request) -> web.Response:
        return answer(msgspec.structs.replace(self._parts.hello, user=request["user"]))

    async def _status(self, request: web.Request) -> web.Response:
        requests, pools = self._parts.requests, self._parts.pools
        shown = [pools.status(name, requests.demand(name).queued) for name in pools.names()]
        hello = msgspec.structs.replace(self._parts.hello, user=request["user"])
        user = None if request["owner"] else request["user"]
        found = await self._parts.views.overview(user, listed(request))
        return answer(Status(hello=hello, pools=tuple(shown), requests=tuple(found)))

    async def _log(self, request: web.Request) -> web.Response:
        lines = int(number(request, "lines", default=100, most=MOST_LINES))
        return text(await asyncio.to_thread(last_entries, self._parts.config.places.log, lines))

    async def _collect(self, request: web.Request) -> web.Response:
        return answer(await self._collector.collect(dry=request.query.get("dry") == "1"))

    async def _stop(self, request: web.Request) -> web.Response:
        self._parts.stop(request.query.get("workers") == "1")
        return done()
