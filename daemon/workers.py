"""The HTTP interface for workers, over TLS: who they are, what they run, and how it ended."""

from __future__ import annotations

import hmac
import logging
import math
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from nnsight_hpc.daemon.errors import error_response, errors_as_reports
from nnsight_hpc.daemon.records import UNREGISTERED, same_job
from nnsight_hpc.daemon.web import LONGEST_WAIT, answer, done, message, number, required
from nnsight_hpc.wire.errors import Conflict, Denied, Incompatible, InvalidInput, NotFound, Unreachable
from nnsight_hpc.wire.files import read_if_there
from nnsight_hpc.wire.http import JSON
from nnsight_hpc.wire.messages import PROTOCOL, decode
from nnsight_hpc.wire.names import check_name
from nnsight_hpc.wire.pools import PoolSpec
from nnsight_hpc.wire.states import ReplicaState
from nnsight_hpc.wire.workers import (
    Begun,
    EndRecord,
    Orders,
    Outcome,
    SliceAsk,
    SliceGiven,
    SliceProgress,
    SlicesOpened,
    WorkerHello,
    WorkerReport,
    WorkerWelcome,
)

if TYPE_CHECKING:
    from aiohttp.typedefs import Handler, Middleware

    from nnsight_hpc.daemon.parts import Parts
    from nnsight_hpc.daemon.records import Replica
    from nnsight_hpc.wire.workers import Lease

logger = logging.getLogger(__name__)

_R = ReplicaState
_MOST = 10_000
"""Requests that are handed out together."""
_OUTCOMES_BYTES = 16 << 20
"""The largest message of a worker: the outcomes of requests that shared a forward, with small results (in base64)."""


def workers_app(parts: Parts, secret: str) -> web.Application:
    app = web.Application(
        middlewares=[errors_as_reports, _only_workers(secret, parts.hello.epoch)], client_max_size=_OUTCOMES_BYTES
    )
    app.add_routes(WorkersApi(parts).routes())
    return app


def _only_workers(secret: str, epoch: int) -> Middleware:
    expected = f"Bearer {secret}".encode()

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if not hmac.compare_digest(given, expected):
            logger.warning("refused %s %s from %s: wrong secret", request.method, request.path, request.remote)
            return error_response(
                Denied("the secret is wrong", next="read it again from the daemon's home"), status=401
            )
        if request.headers.get("X-NNsight-Epoch") != str(epoch):
            asked = request.headers.get("X-NNsight-Epoch")
            logger.warning("refused %s %s from %s: epoch %s", request.method, request.path, request.remote, asked)
            # 421 Misdirected Request (RFC 9110); `Unreachable` lets a worker look for its daemon again
            wrong = Unreachable(
                f"this daemon has epoch {epoch}, the worker asks for {asked}",
                next="read the lease again",
            )
            return error_response(wrong, status=421)
        try:
            return await handler(request)
        except (Conflict, InvalidInput) as error:  # said too late, or garbled
            logger.warning("refused %s %s from %s: %s", request.method, request.path, request.remote, error.what)
            raise

    return check


class WorkersApi:
    def __init__(self, parts: Parts) -> None:
        self._config, self._epoch, self._changes = parts.config, parts.hello.epoch, parts.changes
        self._pools, self._requests, self._reconciler = parts.pools, parts.requests, parts.reconciler

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/w1/register", self._register),
            web.post("/w1/report", self._report),
            web.post("/w1/orders", self._wait_for_orders),
            web.post("/w1/lease", self._lease),
            web.post("/w1/started", self._started),
            web.post("/w1/held", self._held),
            web.post("/w1/log", self._log),
            web.post("/w1/progress", self._progress),
            web.post("/w1/slices", self._slices),
            web.post("/w1/slice", self._slice),
            web.post("/w1/outcomes", self._outcomes),
            web.post("/w1/end", self._end),
        ]

    async def _register(self, request: web.Request) -> web.Response:
        hello = await message(request, WorkerHello)
        if hello.protocol != PROTOCOL:
            raise Incompatible(
                f"the worker speaks protocol {hello.protocol}, the daemon {PROTOCOL}",
                where=f"worker {hello.version} on {hello.host}",
                next="install the same version of nnsight-hpc for both",
            )
        replica = await self._known_or_adopted(hello)
        self._pools.hear(replica.id)
        state = _R.LOADING if replica.state in UNREGISTERED else replica.state
        job_id = replica.status.job_id or hello.job_id
        replica = await self._pools.change(replica, state=state, reason="", host=hello.host, job_id=job_id)
        logger.info("replica %s has registered from %s, process %s", hello.replica, hello.host, hello.pid)
        return answer(
            WorkerWelcome(
                pool=replica.spec,
                requests_folder=str(self._config.places.requests),
                datasets_folder=str(self._config.places.datasets),
                epoch=self._epoch,
            )
        )

    async def _known_or_adopted(self, hello: WorkerHello) -> Replica:
        """The replica that a worker says it is; one with a job.json that we have not submitted is taken up."""
        check_name(hello.replica, of="replica")
        try:
            return self._pools.replica(hello.replica)
        except NotFound:
            data = read_if_there(self._config.places.replica(hello.replica) / "job.json")
            if data is None:
                raise
        logger.info("replica %s, job %s, is taken up", hello.replica, hello.job_id)
        return await self._pools.adopt(hello.replica, decode(data, PoolSpec, what="job.json"), hello.job_id)

    async def _report(self, request: web.Request) -> web.Response:
        report = await message(request, WorkerReport)
        replica = self._pools.replica(report.replica)
        self._pools.hear(replica.id)
        self._requests.claimed(replica.id, report.running)
        await self._pools.change(
            replica,
            state=_R.DRAINING if replica.state == _R.DRAINING else report.state,
            loaded=report.loaded,
            total=report.total,
            free=report.free,
            ends=replica.status.ends or report.ends,  # what the batch system has said since is newer
        )
        if report.state.serves and not replica.served:  # how long a load takes is known now
            await self._requests.hopeless.fail_too_long(replica.spec.name)
        pool = self._pools.get(replica.spec.name)
        if report.model is not None and pool.model != report.model and same_job(replica, pool):
            await self._learn_model(replica, report)
        return answer(self._orders(replica.id))

    async def _learn_model(self, replica: Replica, report: WorkerReport) -> None:
        """Now that the pool's weights are known, requests that were made for others cannot wait for it any longer."""
        pool = await self._pools.change_pool(replica.spec.name, model=report.model)
        assert pool.model is not None
        await self._requests.hopeless.fail_other_models(pool.spec.name, pool.model)

    async def _lease(self, request: web.Request) -> web.Response:
        """Waits for requests of the pool; none is given to a connection that was closed in the meantime."""
        replica = self._pools.replica(required(request, "replica"))
        wait = number(request, "wait", default=0, most=LONGEST_WAIT)
        most = int(number(request, "most", default=1, most=_MOST))
        tokens = number(request, "tokens", default=math.inf, most=math.inf)
        self._pools.hear(replica.id)

        async def lease() -> list[Lease]:
            if self._must_end(replica.id) or request.transport is None or request.transport.is_closing():
                return []
            found = await self._requests.lease(replica.spec.name, replica.id, most, tokens)
            if found:
                self._pools.use(replica.id)
            return found

        def enough(leases: list[Lease]) -> bool:
            return bool(leases) or self._must_end(replica.id)

        leased = await self._changes.wait(f"queue:{replica.spec.name}", lease, enough, wait)
        return answer(leased)

    async def _started(self, request: web.Request) -> web.Response:
        begun = decode(await request.read(), list[Begun], what="list of what has begun")
        await self._requests.starts.started(required(request, "replica"), begun)
        return done()

    async def _held(self, request: web.Request) -> web.Response:
        """Returns once it is on disk that the replica has this attempt."""
        await self._requests.confirm(required(request, "replica"), required(request, "id"), _count(request, "attempt"))
        return done()

    async def _log(self, request: web.Request) -> web.Response:
        name, replica, attempt = required(request, "id"), required(request, "replica"), _count(request, "attempt")
        await self._requests.starts.said(name, replica, attempt, _count(request, "at"), await request.read())
        return done()

    async def _progress(self, request: web.Request) -> web.Response:
        replica = required(request, "replica")
        await self._requests.dumps.hear(required(request, "id"), replica, await message(request, SliceProgress))
        return answer(self._orders(replica))

    async def _slices(self, request: web.Request) -> web.Response:
        replica = required(request, "replica")
        await self._requests.dumps.open(required(request, "id"), replica, await message(request, SlicesOpened))
        return done()

    async def _slice(self, request: web.Request) -> web.Response:
        """Waits while others write the last slices, unless the worker is to do something else."""
        replica, name, ask = required(request, "replica"), required(request, "id"), await message(request, SliceAsk)
        wait = number(request, "wait", default=0, most=LONGEST_WAIT)

        async def given() -> SliceGiven:
            return await self._requests.dumps.next(name, replica, ask)

        def enough(found: SliceGiven) -> bool:
            return found != SliceGiven() or self._orders(replica) != Orders()

        found: SliceGiven = await self._changes.wait(f"orders:{replica}", given, enough, wait)
        return answer(found)

    async def _outcomes(self, request: web.Request) -> web.Response:
        replica = required(request, "replica")
        outcomes = decode(await request.read(), list[Outcome], what="list of outcomes")
        refused = await self._requests.outcomes(replica, outcomes)
        self._pools.use(replica)
        return web.Response(body=msgspec.json.encode(refused), content_type=JSON)

    async def _end(self, request: web.Request) -> web.Response:
        record = await message(request, EndRecord)
        await self._reconciler.ended(record.replica, record.cause, record.detail)
        return done()

    async def _wait_for_orders(self, request: web.Request) -> web.Response:
        replica = self._pools.replica(required(request, "replica")).id
        self._pools.hear(replica)
        wait = number(request, "wait", default=0, most=LONGEST_WAIT)

        async def orders() -> Orders:
            return self._orders(replica)

        return answer(await self._changes.wait(f"orders:{replica}", orders, lambda found: found != Orders(), wait))

    def _orders(self, replica: str) -> Orders:
        return Orders(
            drain=self._must_end(replica),
            cancel=self._requests.holdings.cancelled(replica),
            give_way=self._requests.scheduler.gives_way(replica),
        )

    def _must_end(self, replica: str) -> bool:
        try:
            found = self._pools.replica(replica)
        except NotFound:
            return True
        return self._pools.is_leaving(found)


def _count(request: web.Request, name: str) -> int:
    given = required(request, name)
    if not given.isascii() or not given.isdigit():
        raise InvalidInput(f"{name}={given} is not a whole number of at least 0", where=request.path)
    return int(given)
