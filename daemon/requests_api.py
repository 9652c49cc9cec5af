"""The HTTP interface for requests: sent, watched, cancelled, and their results."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from aiohttp import web

from nnsight_hpc.daemon.frames import check_run, is_known
from nnsight_hpc.daemon.new_request import NewRequest
from nnsight_hpc.daemon.policy import check_graph
from nnsight_hpc.daemon.refusals import fingerprint_error, needs_error, result_error
from nnsight_hpc.daemon.web import LAST_BYTE, LONGEST_WAIT, answer, file, listed, needs_of, number, priority_of
from nnsight_hpc.graph.cobatch import batch_key
from nnsight_hpc.wire.errors import CorruptData, InvalidInput
from nnsight_hpc.wire.frames import pack
from nnsight_hpc.wire.http import FRAME
from nnsight_hpc.wire.messages import encode
from nnsight_hpc.wire.states import RequestState

if TYPE_CHECKING:
    from pathlib import Path
    from typing import BinaryIO

    from nnsight_hpc.daemon.arrivals import Arrivals
    from nnsight_hpc.daemon.new_request import Accepted
    from nnsight_hpc.daemon.parts import Parts
    from nnsight_hpc.graph import Graph
    from nnsight_hpc.graph.cobatch import BatchKey


class RequestsApi:
    def __init__(self, parts: Parts, arrivals: Arrivals) -> None:
        self._pools, self._requests, self._views = parts.pools, parts.requests, parts.views
        self._arrivals, self._owner = arrivals, parts.hello.owner

    def routes(self) -> list[web.RouteDef]:
        return [
            web.put("/v1/requests/{id}", self._put),
            web.post("/v1/requests/{id}", self._run),
            web.get("/v1/requests", self._list),
            web.get("/v1/requests/{id}", self._get),
            web.get("/v1/requests/{id}/log", self._log),
            web.get("/v1/requests/{id}/story", self._story),
            web.get("/v1/requests/{id}/result", self._result),
            web.delete("/v1/requests/{id}", self._cancel),
        ]

    async def _put(self, request: web.Request) -> web.Response:
        accepted = await self._begin(request, waits=True)
        return answer(self._views.status_of(await accepted.durable))

    async def _run(self, request: web.Request) -> web.Response:
        """As `_put`, then wait for what it says or for its end; a small result comes with that.

        An end that answers all is told at once, also where neither it nor the request is on disk yet: nothing else has been
        acknowledged then, and who does not get the answer sends the request again.
        """
        name, wait = request.match_info["id"], number(request, "wait", default=0, most=LONGEST_WAIT)
        news = self._views.news(name)
        accepted = await self._begin(request, waits=False)
        if not accepted.row.state.ended:
            with suppress(TimeoutError):
                await asyncio.wait_for(news.wait(), wait)
        if fresh := self._requests.fresh(name):
            log, result = self._views.fresh_log(fresh.row), fresh.result
        else:
            await accepted.durable
            log, result = await self._views.answer(name)
        return web.Response(body=pack(encode(log), result), content_type=FRAME)

    async def _begin(self, request: web.Request, *, waits: bool) -> Accepted:
        """Have a request queued; as it is then, or as it is where it has been sent before."""
        received, needs = time.time(), needs_of(request)
        priority, exclusive = priority_of(request), request.query.get("exclusive") == "1"

        def look(file: BinaryIO) -> tuple[Graph, BatchKey | None]:
            graph, forms = check_run(file)
            return graph, batch_key(graph, forms, exclusive=exclusive)

        async def describe(file: BinaryIO) -> NewRequest:
            graph, batch = look(file) if is_known(file) else await asyncio.to_thread(look, file)
            pool = request.query.get("pool") or self._pools.for_model(graph.model)
            held = self._pools.accepting(pool)
            if error := (
                fingerprint_error(pool, held.model, graph.model.fingerprint)
                or needs_error(pool, needs, self._pools.longest(pool))
            ):
                raise error
            if held.spec.policy is not None:
                await asyncio.to_thread(check_graph, graph, held.spec, self._owner)
            return NewRequest(
                id=request.match_info["id"],
                kind="run",
                pool=pool,
                user=request["user"],
                received=received,
                fingerprint=graph.model.fingerprint,
                needs=needs,
                priority=priority,
                batch=batch.key if batch else "",
                tokens=batch.tokens if batch else 0,
            )

        return await self._arrivals.begin(request, request.match_info["id"], describe, waits=waits)

    async def _list(self, request: web.Request) -> web.Response:
        user, limit = None if request["owner"] else request["user"], listed(request)
        given, before = request.query.get("state", ""), request.query.get("before", "")
        if not given and not before:
            return answer(await self._views.overview(user, limit))
        return answer(await self._views.page(_states(request, given), user, limit, before))

    async def _get(self, request: web.Request) -> web.Response:
        name, wait = request.match_info["id"], number(request, "wait", default=0, most=LONGEST_WAIT)
        return answer(await self._views.wait(name, request.query.get("seen", ""), wait))

    async def _log(self, request: web.Request) -> web.Response:
        start = int(number(request, "from", default=0, most=LAST_BYTE))
        wait = number(request, "wait", default=0, most=LONGEST_WAIT)
        return answer(await self._views.log(request.match_info["id"], start, request.query.get("seen", ""), wait))

    async def _result(self, request: web.Request) -> web.StreamResponse:
        row = await self._views.row(request.match_info["id"])
        if error := result_error(row):
            raise error
        path = await self._requests.results.in_file(row)
        if await asyncio.to_thread(_size, path) != row.result_bytes:
            raise CorruptData(
                f"the result of request {row.id} is not there as its worker wrote it",
                where=str(path),
                why=f"it should have {row.result_bytes} bytes",
                next="send the request again",
            )
        return file(path)

    async def _story(self, request: web.Request) -> web.Response:
        return answer(await self._views.story(request.match_info["id"]))

    async def _cancel(self, request: web.Request) -> web.Response:
        await self._requests.cancel(request.match_info["id"])
        return answer(await self._views.status(request.match_info["id"]))


def _size(path: Path) -> int | None:
    """None where there is no such file."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _states(request: web.Request, given: str) -> set[RequestState]:
    """Those that are named, with commas between them; all, where none is."""
    try:
        return {RequestState(name) for name in given.split(",")} if given else {*RequestState}
    except ValueError as error:
        allowed = ", ".join(RequestState)
        raise InvalidInput(
            f"state={given} is no list of states", where=request.path, why=f"{error}: {allowed}"
        ) from None
