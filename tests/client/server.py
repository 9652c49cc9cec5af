"""A small daemon for the client's tests: aiohttp on a Unix socket, the contract's paths, and faults on demand."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import threading
import time
from typing import TYPE_CHECKING, Any, Self

import google_crc32c
import msgspec
from aiohttp import web

from nnsight_hpc.wire.errors import Conflict, HpcError, NotFound
from nnsight_hpc.wire.frames import pack, unpack
from nnsight_hpc.wire.http import ERROR
from nnsight_hpc.wire.messages import (
    PROTOCOL,
    DatasetFile,
    DatasetStatus,
    DumpProgress,
    DumpSpec,
    Hello,
    LeaseRecord,
    LogLine,
    ModelFile,
    ModelIdentity,
    PoolModel,
    RequestLog,
    RequestStatus,
    decode,
    encode,
)
from nnsight_hpc.wire.pools import Status
from nnsight_hpc.wire.states import RequestState
from tests.client.server_pools import PoolsServer, answer

if TYPE_CHECKING:
    from pathlib import Path


class Server(PoolsServer):
    """The daemon of `home`: it holds the lease, so that nobody starts another one.

    `truncate_at` breaks the connection after so many bytes of a file, once; `replace` overrides what a dataset's files
    contain. `small_results`: a result comes with the end of a request. `calls` are all calls, with their connections.
    `waits_for` is what a new request waits for, until `hold` is set; `looks` counts how often one was looked at.
    """

    def __init__(self, home: Path, socket_path: Path, executor: str = "embedded") -> None:
        super().__init__()
        self.home, self.socket_path, self.executor = home, socket_path, executor
        self.waits_for, self.user = "", "alice"
        self.looks = 0
        self.small_results = True
        self.calls: list[tuple[str, Any]] = []
        self.requests: dict[str, RequestStatus] = {}
        self.said: dict[str, list[LogLine]] = {}
        self.model, self.model_files = ModelIdentity(id="org/model"), dict[str, bytes]()
        self.bodies: dict[str, bytes] = {}
        self.results: dict[str, bytes] = {}
        self.datasets: dict[str, Path] = {}
        self.truncate_at: int | None = None
        self.replace: dict[str, bytes] = {}
        self.served: list[tuple[str, str]] = []
        self.stopped: list[str] = []
        self.protocol = PROTOCOL
        self.writing: dict[str, RequestStatus] = {}
        self.hold = asyncio.Event()
        self.hold.set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(120)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(120)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(120)
        self._loop.close()

    def hello(self) -> Hello:
        return Hello(
            protocol=self.protocol,
            version="0.0.test",
            owner="alice",
            host=socket.gethostname(),
            pid=os.getpid(),
            epoch=1,
            executor=self.executor,
            home=str(self.home),
            user=self.user,
        )

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    async def _start(self) -> None:
        app = web.Application(middlewares=[self._noted, _errors], client_max_size=1 << 30)
        for method, path, handler in [
            ("GET", "/v1/hello", self._hello),
            ("GET", "/v1/status", self._status),
            ("GET", "/v1/pools/{name}/model", self._model),
            ("GET", "/v1/pools/{name}/model/{file}", self._model_file),
            ("PUT", "/v1/requests/{id}", self._put_request),
            ("POST", "/v1/requests/{id}", self._run_request),
            ("GET", "/v1/requests", self._list_requests),
            ("GET", "/v1/requests/{id}", self._get_request),
            ("DELETE", "/v1/requests/{id}", self._cancel_request),
            ("GET", "/v1/requests/{id}/log", self._request_log),
            ("GET", "/v1/requests/{id}/result", self._result),
            ("PUT", "/v1/datasets/{name}", self._put_dataset),
            ("GET", "/v1/datasets", self._list_datasets),
            ("GET", "/v1/datasets/{name}", self._get_dataset),
            ("DELETE", "/v1/datasets/{name}", self._remove_dataset),
            ("GET", "/v1/datasets/{name}/files", self._files),
            ("GET", "/v1/datasets/{name}/files/{path:.+}", self._file),
            ("POST", "/v1/stop", self._stop),
            ("GET", "/v1/log", self._daemon_log),
        ]:
            app.router.add_route(method, path, handler)
        app.add_routes(self.routes())
        self._runner = web.AppRunner(app, shutdown_timeout=1)
        await self._runner.setup()
        await web.UnixSite(self._runner, str(self.socket_path)).start()
        self.home.mkdir(parents=True, exist_ok=True)
        lease = LeaseRecord(
            epoch=1, host=socket.gethostname(), pid=os.getpid(), nonce="n", socket=str(self.socket_path)
        )
        (self.home / "lease.json").write_bytes(encode(lease))

    def hang_up(self) -> None:
        """End all connections."""
        for _, connection in self.calls:
            self._loop.call_soon_threadsafe(connection.abort)

    @web.middleware
    async def _noted(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.calls.append((f"{request.method} {request.path}", request.transport))
        return await handler(request)

    async def _hello(self, _request: web.Request) -> web.Response:
        return answer(self.hello())

    async def _status(self, _request: web.Request) -> web.Response:
        return answer(
            Status(hello=self.hello(), pools=tuple(self.pools.values()), requests=tuple(self.requests.values()))
        )

    async def _model(self, request: web.Request) -> web.Response:
        self.find_pool(request)
        files = [
            ModelFile(name=name, size=len(data), sha256=hashlib.sha256(data).hexdigest())
            for name, data in sorted(self.model_files.items())
        ]
        return answer(PoolModel(model=self.model, files=tuple(files)))

    async def _model_file(self, request: web.Request) -> web.Response:
        name = request.match_info["file"]
        self.served.append((name, ""))
        return web.Response(body=self.replace.get(name, self.model_files[name]))

    async def _put_request(self, request: web.Request) -> web.Response:
        name, body = request.match_info["id"], await request.read()
        self.bodies[name] = body
        self.queries.append(dict(request.query))
        pool = request.query.get("pool", "smol")
        if pool not in self.pools:
            raise NotFound(f"there is no pool {pool!r}", why="there are: none")
        self.requests[name] = RequestStatus(
            id=name, kind="run", pool=pool, state=RequestState.QUEUED, user="alice", waits_for=self.waits_for
        )
        header, block = unpack(body)
        self.results[name] = pack(_RESULT % len(header), block)
        return answer(self.requests[name])

    async def _run_request(self, request: web.Request) -> web.Response:
        """As `_put_request`, with what the first poll would say, and the result where that is its end."""
        await self._put_request(request)
        log = await self._log_of(request.match_info["id"], 0, float(request.query["wait"]))
        result = self.results[log.status.id] if log.complete and self.small_results else b""
        return web.Response(body=pack(encode(log), result))

    async def _list_requests(self, request: web.Request) -> web.Response:
        self.queries.append(dict(request.query))
        return answer(list(self.requests.values()))

    async def _get_request(self, request: web.Request) -> web.Response:
        status = self._request(request)
        self.looks += 1
        if float(request.query.get("wait", 0)) and not status.state.ended:
            await asyncio.sleep(0.05)
            if self.hold.is_set():
                status = self.finish(status.id)
        return answer(status)

    async def _request_log(self, request: web.Request) -> web.Response:
        """Two lines in each answer; a request that is waited for ends when all has been said."""
        name, query = self._request(request).id, request.query
        return answer(await self._log_of(name, int(query["from"]), float(query["wait"])))

    async def _log_of(self, name: str, start: int, wait: float) -> RequestLog:
        status, said = self.requests[name], self.said.get(name, [])
        lines = said[start : start + 2]
        if not lines and wait:
            await asyncio.sleep(0.05)
            status = self.finish(status.id) if self.hold.is_set() and not status.state.ended else status
        complete = status.state.ended and start + len(lines) == len(said)
        return RequestLog(status=status, lines=tuple(lines), next=start + len(lines), complete=complete)

    def finish(self, name: str, state: RequestState = RequestState.COMPLETED, **changes: Any) -> RequestStatus:
        times = {state: time.time()}
        self.requests[name] = msgspec.structs.replace(self.requests[name], state=state, times=times, **changes)
        return self.requests[name]

    async def _cancel_request(self, request: web.Request) -> web.Response:
        return answer(self.finish(self._request(request).id, RequestState.CANCELLED))

    async def _result(self, request: web.Request) -> web.Response:
        return web.Response(body=self.results[self._request(request).id], content_type="application/octet-stream")

    async def _put_dataset(self, request: web.Request) -> web.Response:
        name, body = request.match_info["name"], await request.read()
        if name in self.datasets:
            raise Conflict(f"there is a dataset {name!r} already", next="choose another name")
        spec = decode(unpack(body)[0], DumpSpec)
        self.datasets[name] = self.home / "datasets" / f"{name}.zarr"
        self.bodies[name] = body
        status = RequestStatus(
            id=request.query["request"],
            kind="dump",
            pool=request.query["pool"],
            state=RequestState.RUNNING,
            user="alice",
            progress=DumpProgress(
                documents=3, documents_total=3, tokens=10, tokens_total=10, bytes=spec.context, seconds=2.0
            ),
        )
        self.requests[status.id] = status
        return answer(status)

    async def _list_datasets(self, _request: web.Request) -> web.Response:
        return answer([self._dataset(name) for name in self.datasets])

    async def _get_dataset(self, request: web.Request) -> web.Response:
        return answer(self._dataset(request.match_info["name"]))

    async def _files(self, request: web.Request) -> web.Response:
        root = self._folder_of(request)
        paths = sorted(path for path in root.rglob("*") if path.is_file())
        files = [
            DatasetFile(
                path=str(path.relative_to(root)),
                size=path.stat().st_size,
                crc32c=google_crc32c.value(path.read_bytes()),
            )
            for path in paths
        ]
        return answer(files)

    async def _file(self, request: web.Request) -> web.StreamResponse:
        path = request.match_info["path"]
        self.served.append((path, request.headers.get("Range", "")))
        file = self._folder_of(request) / path
        if path in self.replace:
            return web.Response(body=self.replace[path])
        if self.truncate_at is not None and file.stat().st_size > self.truncate_at:
            return await self._truncated(request, file.read_bytes())
        return web.FileResponse(file)

    async def _truncated(self, request: web.Request, data: bytes) -> web.StreamResponse:
        """Promises the whole file, sends a part of it, and hangs up."""
        response = web.StreamResponse(headers={"Content-Length": str(len(data))})
        await response.prepare(request)
        await response.write(data[: self.truncate_at])
        self.truncate_at = None
        assert request.transport is not None
        request.transport.close()
        return response

    async def _stop(self, request: web.Request) -> web.Response:
        self.stopped.append(request.query_string)
        return answer({})

    async def _daemon_log(self, _request: web.Request) -> web.Response:
        return web.Response(text="the daemon's log\n")

    def _request(self, request: web.Request) -> RequestStatus:
        if request.match_info["id"] not in self.requests:
            raise NotFound(f"there is no request {request.match_info['id']}")
        return self.requests[request.match_info["id"]]

    async def _remove_dataset(self, request: web.Request) -> web.Response:
        status = self._dataset(request.match_info["name"])
        del self.datasets[status.name]
        return answer(status)

    def _folder_of(self, request: web.Request) -> Path:
        self._dataset(request.match_info["name"])
        return self.datasets[request.match_info["name"]]

    def _dataset(self, name: str) -> DatasetStatus:
        if name not in self.datasets:
            raise NotFound(f"there is no dataset {name!r}")
        request = self.writing.get(name)
        return DatasetStatus(name=name, path=str(self.datasets[name]), complete=request is None, request=request)


_RESULT = b'{"format":"nnsight-hpc/values","version":1,"values":{"echo":%d}}'


@web.middleware
async def _errors(request: web.Request, handler: Any) -> web.StreamResponse:
    try:
        response: web.StreamResponse = await handler(request)
    except HpcError as error:
        return web.Response(status=error.http_status, body=encode(error.report()), content_type=ERROR)
    return response
