"""A small daemon for tests of the worker: the real TLS, lease record and secret, and a queue that tests can look into."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import threading
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import web

from nnsight_hpc.daemon.certificate import load_secret, server_context
from nnsight_hpc.storage.slice_queue import SliceQueue
from nnsight_hpc.wire.errors import Conflict, ErrorReport, HpcError, NotFound
from nnsight_hpc.wire.files import write_atomically
from nnsight_hpc.wire.http import ERROR
from nnsight_hpc.wire.messages import DumpProgress, LeaseRecord, LogLine, decode, encode
from nnsight_hpc.wire.workers import (
    Begun,
    EndRecord,
    Lease,
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
    from pathlib import Path

    from nnsight_hpc.wire.places import Places
    from nnsight_hpc.wire.pools import PoolSpec


def wait_for(condition, what: str, seconds: float = 120.0) -> Any:
    """The first true value of `condition()`, or a failed test that says `what` did not come."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"{what} did not come in {seconds} s"
        time.sleep(0.01)
    return value


class StandIn:
    """Speaks ``/w1`` in a thread of its own. What workers send is kept; `stop` and `start` are a crash and a restart."""

    def __init__(self, places: Places, spec: PoolSpec) -> None:
        self.places, self.spec = places, spec
        self.epoch = 0
        self.hellos: list[WorkerHello] = []
        self.reports: list[WorkerReport] = []
        self.outcomes: dict[str, list[Outcome]] = defaultdict(list)
        self.said: dict[str, bytearray] = defaultdict(bytearray)
        self.posts: list[tuple[str, float]] = []
        self.log_error: HpcError | None = None
        self.progress: dict[str, list[DumpProgress]] = defaultdict(list)
        self.queues: dict[str, SliceQueue] = {}
        self.ends: list[EndRecord] = []
        self.started: list[str] = []
        self.confirmed: list[str] = []
        self.confirm_error: HpcError | None = None
        self.refused = 0
        self.orders, self.asked_for_orders = Orders(), 0
        self.asked_for_work, self.answers_polls, self.reports_answer = 0, True, True
        self.unknown: set[str] = set()
        self.forgotten: set[str] = set()
        self.outcome_error: HpcError | None = None
        self._waiting: list[Lease] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        places.requests.mkdir(parents=True, exist_ok=True)

    def start(self) -> None:
        self.epoch += 1
        up = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(up)), daemon=True)
        self._thread.start()
        assert up.wait(120)

    def stop(self) -> None:
        """Cut every connection at once and forget nothing, as a killed daemon does."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()
            self._loop = None

    def submit(
        self,
        frame: bytes | None,
        *,
        kind: str = "run",
        attempt: int = 1,
        request: str = "",
        result: Path | None = None,
        result_bytes: int | None = None,
    ) -> str:
        """Queue a request; one whose bytes are gone when `frame` is None."""
        request = request or f"r-{secrets.token_hex(6)}"
        path = self.places.requests / f"{request}.request"
        if frame is not None:
            write_atomically(path, frame)
        result = result or self.places.requests / f"{request}.{attempt}.result"
        self._waiting.append(
            Lease(
                id=request,
                kind=kind,
                attempt=attempt,
                request=str(path),
                result=str(result),
                user="me",
                result_bytes=result_bytes,
            )
        )
        return request

    def submit_together(self, frames: list[bytes], *names: str) -> list[str]:
        """Queue requests that may share a forward, all at once."""
        leases = []
        for request, frame in zip(names or [f"r-{secrets.token_hex(6)}" for _ in frames], frames, strict=True):
            path, result = (self.places.requests / f"{request}.{end}" for end in ("request", "1.result"))
            write_atomically(path, frame)
            paths = {"request": str(path), "result": str(result)}
            leases.append(Lease(id=request, kind="run", attempt=1, user="me", batch="same", **paths))
        self._waiting += leases
        return [lease.id for lease in leases]

    def submit_held(self) -> tuple[str, Path]:
        """Queue a request that begins, and goes no further until its bytes are written to the pipe that comes with its id."""
        request = f"r-{secrets.token_hex(6)}"
        pipe = self.places.requests / f"{request}.request"
        os.mkfifo(pipe)
        self.submit(None, request=request)
        wait_for(lambda: request in self.started, f"the start of {request}")
        return request, pipe

    def outcome(self, request: str, seconds: float = 120.0) -> Outcome:
        return wait_for(lambda: self.outcomes[request], f"the outcome of {request}", seconds)[0]

    def lines(self, request: str) -> list[LogLine]:
        """What the worker has sent so far of what the request says."""
        return [decode(line, LogLine) for line in bytes(self.said[request]).splitlines()]

    def result(self, request: str, attempt: int = 1) -> bytes:
        """As it came with the outcome, or as it lies in its file."""
        return self.outcome(request).result or (self.places.requests / f"{request}.{attempt}.result").read_bytes()

    def wait_state(self, state: str, seconds: float = 120.0) -> WorkerReport:
        wait_for(lambda: self.reports and self.reports[-1].state == state, f"state {state}", seconds)
        return self.reports[-1]

    async def _serve(self, up: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self.places.home.mkdir(parents=True, exist_ok=True)
        context = server_context(self.places)
        self.secret = load_secret(self.places)
        app = web.Application(middlewares=[self._check])
        names = (
            *("register", "report", "orders", "lease", "started", "held", "log"),
            *("progress", "slices", "slice", "outcomes", "end"),
        )
        app.add_routes([web.post(f"/w1/{name}", getattr(self, f"_{name}")) for name in names])
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
        await site.start()
        port = runner.addresses[0][1]
        record = LeaseRecord(
            epoch=self.epoch,
            host=socket.gethostname(),
            pid=0,
            nonce=secrets.token_hex(8),
            socket="",
            address="127.0.0.1",
            port=port,
            certificate=self.places.certificate.read_text(),
        )
        write_atomically(self.places.lease, encode(record))
        up.set()
        await self._stop.wait()
        for connection in list(runner.server.connections):
            if connection.transport is not None:
                connection.transport.abort()
        await runner.cleanup()

    @web.middleware
    async def _check(self, request: web.Request, handler) -> web.Response:
        if request.headers.get("Authorization") != f"Bearer {self.secret}":
            self.refused += 1
            return _error(ErrorReport("Denied", "the secret is wrong"), 401)
        if request.headers.get("X-NNsight-Epoch") != str(self.epoch):
            return _error(ErrorReport("Unreachable", "another epoch"), 421)
        try:
            if request.query.get("replica") in self.unknown | self.forgotten:
                raise NotFound("no such replica")
            answer = await handler(request)
        except HpcError as error:
            return _error(error.report(), error.http_status)
        return web.Response(body=msgspec.json.encode(answer), content_type="application/json")

    async def _register(self, request: web.Request) -> Any:
        hello = decode(await request.read(), WorkerHello)
        self.hellos.append(hello)
        if hello.replica in self.unknown:
            raise NotFound("no such replica")
        self.forgotten.discard(hello.replica)
        return WorkerWelcome(
            pool=self.spec,
            requests_folder=str(self.places.requests),
            datasets_folder=str(self.places.datasets),
            epoch=self.epoch,
        )

    async def _report(self, request: web.Request) -> Any:
        self.reports.append(decode(await request.read(), WorkerReport))
        return self.orders if self.reports_answer else Orders()

    async def _orders(self, request: web.Request) -> Any:
        self.asked_for_orders += 1
        end = time.monotonic() + float(request.query["wait"])
        while time.monotonic() < end and request.transport is not None:
            if self.orders != Orders():
                break
            await asyncio.sleep(0.05)
        return self.orders

    async def _lease(self, request: web.Request) -> Any:
        self.asked_for_work += 1
        end = time.monotonic() + float(request.query["wait"])
        while (time.monotonic() < end or not self.answers_polls) and request.transport is not None:
            if waiting := self._waiting:
                most = int(request.query["most"]) if waiting[0].batch else 1
                given = [lease for lease in waiting[:most] if lease.batch == waiting[0].batch]
                del waiting[: len(given)]
                return given
            await asyncio.sleep(0.01)
        return []

    async def _started(self, request: web.Request) -> Any:
        self.started += [begun.id for begun in decode(await request.read(), list[Begun])]
        return {}

    async def _held(self, request: web.Request) -> Any:
        error = self.confirm_error  # before the test can see that it was asked
        self.confirmed.append(request.query["id"])
        if error is not None:
            raise error
        return {}

    async def _log(self, request: web.Request) -> Any:
        if self.log_error is not None:
            raise self.log_error
        at, lines = int(request.query["at"]), await request.read()
        self.said[request.query["id"]][at : at + len(lines)] = lines
        self.posts.append((request.query["id"], time.monotonic()))
        return {}

    async def _progress(self, request: web.Request) -> Any:
        name = request.query["id"]
        if queue := self.queues.get(name):
            queue.report(request.query["replica"], decode(await request.read(), SliceProgress))
            self.progress[name].append(queue.progress())
        return self.orders

    async def _slices(self, request: web.Request) -> Any:
        name, opened = request.query["id"], decode(await request.read(), SlicesOpened)
        self.queues.setdefault(name, SliceQueue(opened)).open(opened)
        return {}

    async def _slice(self, request: web.Request) -> Any:
        ask, queue = decode(await request.read(), SliceAsk), self.queues.get(request.query["id"])
        if queue is None:
            return SliceGiven(known=False)
        if ask.written is not None:
            queue.wrote(ask.written)
        number = queue.next(request.query["replica"], ask.begun)
        sums = {"overflows": dict(queue.overflows), "padding": queue.padding}
        return SliceGiven(slice=number, complete=queue.complete, **sums)

    async def _outcomes(self, request: web.Request) -> Any:
        outcomes, error = decode(await request.read(), list[Outcome]), self.outcome_error
        for outcome in outcomes:
            self.outcomes[outcome.id].append(outcome)
        if error is not None and not isinstance(error, Conflict | NotFound):
            raise error
        return [error and error.report() for _ in outcomes]

    async def _end(self, request: web.Request) -> Any:
        self.ends.append(decode(await request.read(), EndRecord))
        return {}


def _error(report: ErrorReport, status: int) -> web.Response:
    return web.Response(status=status, body=encode(report), content_type=ERROR)
