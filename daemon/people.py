"""The HTTP interface for people, on the Unix socket: the daemon itself, pools and requests.

Datasets are in `datasets.py`, the models of pools in `models.py`.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from nnsight_hpc.daemon.arrivals import Arrivals
from nnsight_hpc.daemon.datasets import DatasetsApi
from nnsight_hpc.daemon.errors import errors_as_reports
from nnsight_hpc.daemon.frames import check_run
from nnsight_hpc.daemon.identity import check_peer
from nnsight_hpc.daemon.logs import last_lines
from nnsight_hpc.daemon.models import ModelsApi
from nnsight_hpc.daemon.pools import check_spec
from nnsight_hpc.daemon.refusals import fingerprint_error, result_error
from nnsight_hpc.daemon.requests import NewRequest
from nnsight_hpc.daemon.web import LONGEST_WAIT, MESSAGE_BYTES, answer, done, file, message, number, text
from nnsight_hpc.wire.errors import CorruptData, NotFound, from_report
from nnsight_hpc.wire.messages import PoolSpec, PoolStatus, Status
from nnsight_hpc.wire.states import ReplicaState

if TYPE_CHECKING:
    from pathlib import Path

    from aiohttp.typedefs import Handler

    from nnsight_hpc.daemon.parts import Parts
    from nnsight_hpc.daemon.pools import Pools
    from nnsight_hpc.daemon.requests import Requests

_UP_SECONDS = 2.0
"""How long `up` waits for a job id and a reason."""
_NOT_BEGUN = (ReplicaState.SUBMITTED, ReplicaState.DRAINING, ReplicaState.ENDED)
_MOST_LINES = 10_000
_LAST_BYTE = 1 << 62


def people_app(parts: Parts) -> web.Application:
    app = web.Application(middlewares=[errors_as_reports, _only_the_owner], client_max_size=MESSAGE_BYTES)
    arrivals = Arrivals(parts.requests, parts.config)
    app.add_routes(DaemonApi(parts).routes())
    app.add_routes(PoolsApi(parts).routes())
    app.add_routes(ModelsApi(parts).routes())
    app.add_routes(RequestsApi(parts, arrivals).routes())
    app.add_routes(DatasetsApi(parts, arrivals).routes())
    return app


@web.middleware
async def _only_the_owner(request: web.Request, handler: Handler) -> web.StreamResponse:
    request["user"] = check_peer(request)
    return await handler(request)


class DaemonApi:
    """The daemon itself."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v1/hello", self._say_hello),
            web.get("/v1/status", self._status),
            web.get("/v1/log", self._log),
            web.post("/v1/stop", self._stop),
        ]

    async def _say_hello(self, request: web.Request) -> web.Response:
        return answer(msgspec.structs.replace(self._parts.hello, user=request["user"]))

    async def _status(self, request: web.Request) -> web.Response:
        queued = await self._parts.requests.queued()
        pools = [self._parts.pools.status(name, queued.get(name, 0)) for name in self._parts.pools.names()]
        hello = msgspec.structs.replace(self._parts.hello, user=request["user"])
        return answer(Status(hello=hello, pools=tuple(pools), requests=tuple(await self._parts.requests.all())))

    async def _log(self, request: web.Request) -> web.Response:
        lines = int(number(request, "lines", default=100, most=_MOST_LINES))
        return text(await asyncio.to_thread(last_lines, self._parts.config.places.log, lines))

    async def _stop(self, request: web.Request) -> web.Response:
        self._parts.stop(request.query.get("workers") == "1")
        return done()


class PoolsApi:
    """Pools: what is wanted, what there is, what their workers say."""

    def __init__(self, parts: Parts) -> None:
        self._pools, self._requests, self._reconciler = parts.pools, parts.requests, parts.reconciler
        self._changes, self._places = parts.changes, parts.config.places

    def routes(self) -> list[web.RouteDef]:
        return [
            web.put("/v1/pools/{name}", self._put),
            web.get("/v1/pools/{name}", self._get),
            web.delete("/v1/pools/{name}", self._delete),
            web.get("/v1/pools/{name}/log", self._log),
        ]

    async def _put(self, request: web.Request) -> web.Response:
        """Answers once all replicas that are wanted have jobs and are more than submitted, or after two seconds."""
        spec, name = await message(request, PoolSpec), request.match_info["name"]
        check_spec(spec, name)
        await self._pools.put(spec)
        self._reconciler.try_now(name)
        status = await self._changes.wait(f"pool:{name}", lambda: self._status(name), _has_begun, _UP_SECONDS)
        if status.held is not None:
            raise from_report(status.held)
        return answer(status)

    async def _get(self, request: web.Request) -> web.Response:
        name, wait = request.match_info["name"], number(request, "wait", default=0, most=LONGEST_WAIT)
        before = self._pools.newest(name)
        seen = request.query.get("seen", before.state if before else "")

        def news(status: PoolStatus) -> bool:
            newest = self._pools.newest(name)
            return newest != before or (newest.state if newest else "") != seen or status.held is not None

        status = await self._changes.wait(f"pool:{name}", lambda: self._status(name), news, wait)
        return answer(status)

    async def _delete(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        await take_down(self._pools, self._requests, name)
        self._reconciler.knock()
        return answer(await self._status(name))

    async def _log(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        lines = int(number(request, "lines", default=50, most=_MOST_LINES))
        self._pools.get(name)
        newest = self._pools.newest(name)
        replica = request.query.get("replica", newest.id if newest else "")
        if not replica or not self._pools.has_had(name, replica):
            raise NotFound(f"pool {name} has no replica {replica}")
        return text(await asyncio.to_thread(last_lines, self._places.replica(replica) / "log", lines))

    async def _status(self, name: str) -> PoolStatus:
        queued = await self._requests.queued()
        return self._pools.status(name, queued.get(name, 0))


async def take_down(pools: Pools, requests: Requests, name: str) -> None:
    """Want no replica of a pool any more, and fail what waits for it."""
    await pools.delete(name)
    await requests.fail_hopeless(name)


def _has_begun(status: PoolStatus) -> bool:
    if status.held is not None:
        return True
    begun = [one for one in status.replicas if one.state not in _NOT_BEGUN]
    return len(begun) >= status.desired


class RequestsApi:
    """Requests: sent, watched, cancelled, and their results."""

    def __init__(self, parts: Parts, arrivals: Arrivals) -> None:
        self._pools, self._requests, self._arrivals = parts.pools, parts.requests, arrivals

    def routes(self) -> list[web.RouteDef]:
        return [
            web.put("/v1/requests/{id}", self._put),
            web.get("/v1/requests", self._list),
            web.get("/v1/requests/{id}", self._get),
            web.get("/v1/requests/{id}/log", self._log),
            web.get("/v1/requests/{id}/result", self._result),
            web.delete("/v1/requests/{id}", self._cancel),
        ]

    async def _put(self, request: web.Request) -> web.Response:
        received = time.time()

        async def describe(path: Path) -> NewRequest:
            model = await asyncio.to_thread(check_run, path)
            pool = request.query.get("pool") or self._pools.for_model(model)
            if error := fingerprint_error(pool, self._pools.accepting(pool).model, model.fingerprint):
                raise error
            return NewRequest(
                id=request.match_info["id"],
                kind="run",
                pool=pool,
                user=request["user"],
                received=received,
                fingerprint=model.fingerprint,
            )

        return answer(await self._arrivals.receive(request, request.match_info["id"], describe))

    async def _list(self, _: web.Request) -> web.Response:
        return answer(await self._requests.all())

    async def _get(self, request: web.Request) -> web.Response:
        name, wait = request.match_info["id"], number(request, "wait", default=0, most=LONGEST_WAIT)
        return answer(await self._requests.wait(name, request.query.get("seen", ""), wait))

    async def _log(self, request: web.Request) -> web.Response:
        start = int(number(request, "from", default=0, most=_LAST_BYTE))
        wait = number(request, "wait", default=0, most=LONGEST_WAIT)
        return answer(await self._requests.log(request.match_info["id"], start, request.query.get("seen", ""), wait))

    async def _result(self, request: web.Request) -> web.StreamResponse:
        row = await self._requests.row(request.match_info["id"])
        if error := result_error(row):
            raise error
        path = self._requests.result_file(row.id, row.attempt)
        if not path.is_file() or path.stat().st_size != row.result_bytes:
            raise CorruptData(
                f"the result of request {row.id} is not there as its worker wrote it",
                where=str(path),
                why=f"it should have {row.result_bytes} bytes",
                next="send the request again",
            )
        return file(path)

    async def _cancel(self, request: web.Request) -> web.Response:
        return answer(await self._requests.cancel(request.match_info["id"]))
