"""The peers of `latency.py`: HTTP echoes behind a Unix socket, with aiohttp as the daemon has it.

::

    latency_echo.py serve FOLDER       answers on FOLDER/echo.sock, and to its worker over TLS
    latency_echo.py work FOLDER        the worker: it waits for a body by a long poll, and brings it back
    latency_echo.py relay FOLDER       stdio to that socket, as ``nnsight-hpc bridge`` relays

``POST /echo?bytes=N`` is answered with N bytes at once. ``POST /chain?bytes=N`` goes on to the worker and comes back, as a
request does. ``POST /stored?bytes=N`` does that, too, and puts each step on the disk before the next, as a queue does that
acknowledges each: the body and a row, that it was given away, the answer, and that it ended.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from aiohttp import web

from nnsight_hpc.client.bridge import relay
from nnsight_hpc.daemon.certificate import server_context
from nnsight_hpc.daemon.database import connect
from nnsight_hpc.slurm.worker.link import dial
from nnsight_hpc.wire.files import write_atomically
from nnsight_hpc.wire.http import HttpClient
from nnsight_hpc.wire.messages import LeaseRecord, decode, encode
from nnsight_hpc.wire.places import places_at

if TYPE_CHECKING:
    import ssl

SOCKET, LEASE = "echo.sock", "echo.json"
STORED = b"stored"
"""Sent to the worker in place of a body that lies on the disk."""
_ROW = 500
"""Bytes of a row."""


class _Echo:
    def __init__(self, folder: Path) -> None:
        self._waiting: asyncio.Queue[tuple[bytes, asyncio.Future[None]]] = asyncio.Queue()
        self._answer: asyncio.Future[None] | None = None
        self._folder, self._database = folder, connect(folder / "echo.sqlite")
        self._database.execute("CREATE TABLE steps (number INTEGER PRIMARY KEY, what TEXT, body BLOB)")

    def people(self) -> web.Application:
        app = web.Application()
        app.add_routes(
            [web.post("/echo", self._echo), web.post("/chain", self._chain), web.post("/stored", self._stored)]
        )
        return app

    def workers(self) -> web.Application:
        app = web.Application()
        app.add_routes([web.post("/lease", self._lease), web.post("/outcome", self._outcome)])
        return app

    async def _echo(self, request: web.Request) -> web.Response:
        await request.read()
        return web.Response(body=b"e" * int(request.query["bytes"]))

    async def _chain(self, request: web.Request) -> web.Response:
        return await self._ask(request, await request.read())

    async def _stored(self, request: web.Request) -> web.Response:
        body = await request.read()
        await asyncio.to_thread(write_atomically, self._folder / "request", body)
        await asyncio.to_thread(self._note, "received")
        return await self._ask(request, STORED)

    async def _ask(self, request: web.Request, body: bytes) -> web.Response:
        answer = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((body, answer))
        await answer
        return web.Response(body=b"e" * int(request.query["bytes"]))

    async def _lease(self, _request: web.Request) -> web.Response:
        body, self._answer = await self._waiting.get()
        if body == STORED:
            await asyncio.to_thread(self._note, "given away")
        return web.Response(body=body)

    async def _outcome(self, request: web.Request) -> web.Response:
        if await request.read() == STORED:
            await asyncio.to_thread(self._note, "ended")
        assert self._answer is not None, "an outcome follows a lease"
        self._answer.set_result(None)
        return web.Response()

    def _note(self, what: str) -> None:
        with self._database:
            self._database.execute("BEGIN")
            self._database.execute("INSERT INTO steps (what, body) VALUES (?, ?)", (what, b"e" * _ROW))


async def _serve(folder: Path) -> None:
    echo, places = _Echo(folder), places_at(folder)
    people, workers = (web.AppRunner(app, access_log=None) for app in (echo.people(), echo.workers()))
    listener = socket.create_server(("0.0.0.0", 0))  # its worker may be on another host of the test cluster
    for runner in (people, workers):
        await runner.setup()
    await web.SockSite(workers, listener, ssl_context=server_context(places)).start()
    await web.UnixSite(people, str(folder / SOCKET)).start()
    record = LeaseRecord(
        epoch=1,
        host=socket.gethostname(),
        pid=0,
        nonce="echo",
        socket=str(folder / SOCKET),
        port=listener.getsockname()[1],
        certificate=places.certificate.read_text(),
    )
    write_atomically(folder / LEASE, encode(record))
    await asyncio.Event().wait()


def _work(folder: Path) -> None:
    record = decode((folder / LEASE).read_bytes(), LeaseRecord)

    def open_stream() -> ssl.SSLSocket:
        return dial(record)

    polls, calls = (HttpClient(open_stream, peer="the echo") for _ in range(2))
    while True:
        body = polls.call("POST", "/lease", timeout=600)
        if body == STORED:
            write_atomically(folder / "answer", (folder / "request").read_bytes())
        calls.call("POST", "/outcome", body)


def _relay(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as echo:
        echo.connect(str(folder / SOCKET))
        relay(echo)


def main() -> None:
    what, folder = sys.argv[1], Path(sys.argv[2])
    if what == "serve":
        asyncio.run(_serve(folder))
    else:
        {"work": _work, "relay": _relay}[what](folder)


if __name__ == "__main__":
    main()
