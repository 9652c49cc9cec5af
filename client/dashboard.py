"""``nnsight-hpc dashboard``: a port of this machine for a browser, behind a secret, and what the daemon says handed on.

Whoever has an account here can reach the port, and any page in the browser can ask for it. So nothing is answered without
the secret, which is the first part of each path and lives as long as the command does. It is in no cookie, since those go to
all ports of a host, and it is given to the browser in a file of this user's, since arguments of processes are public. `Host`
and `Origin` are looked at, too (DNS rebinding). All that can be asked for is the page and what it shows: nothing changes
anything.
"""

from __future__ import annotations

import asyncio
import secrets
import signal
import socket
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from aiohttp import web

from nnsight_hpc.wire.dashboard import PAGE, Dashboard
from nnsight_hpc.wire.errors import HpcError
from nnsight_hpc.wire.http import ERROR, JSON
from nnsight_hpc.wire.messages import encode

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp.typedefs import Handler, Middleware

    from nnsight_hpc.wire.http import HttpClient

_WAIT = 20.0
"""Seconds after which the daemon answers also without news: so long it takes to notice that a connection is dead."""
_SLACK = 15.0
_LONGEST_PAUSE = 10.0
"""Between two tries while the daemon cannot be reached, in seconds; the first comes after one."""
_SHUTDOWN = 0.1
"""How long answers that are awaited may take once the command ends, in seconds."""
_NAMES = ("127.0.0.1", "localhost")
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Feed:
    """What a daemon says, over one connection for all pages that are open, and asked for only while one of them waits."""

    def __init__(self, client: HttpClient) -> None:
        self._client = client
        self._files: dict[str, bytes] = {}
        self._shown, self._version = b"", ""
        self._asking: asyncio.Future[None] | None = None
        self._pause = 0.0

    def load(self) -> None:
        """Have the page and what it shows; raises why not."""
        self._files = {name: self._client.call("GET", f"/v1/dashboard/{name}") for name in PAGE}
        self._ask("")

    def file(self, name: str) -> bytes:
        return self._files[name]

    async def newer(self, seen: str) -> bytes:
        """What is shown, once it is not what was `seen`, or after some seconds; raises `HpcError` while it is not known."""
        if seen == self._version or self._pause:
            if self._asking is None or self._asking.done():
                self._asking = _in_thread(self._look)
            await asyncio.shield(self._asking)
        return self._shown

    def _look(self) -> None:
        """Ask for news; after a failure from the beginning, since the next daemon may have another page."""
        try:
            if self._pause:
                time.sleep(self._pause)
                self.load()
            else:
                self._ask(self._version)
        except HpcError:
            self._pause = min(2 * self._pause or 1.0, _LONGEST_PAUSE)
            raise
        self._pause = 0.0

    def _ask(self, seen: str) -> None:
        path = f"/v1/dashboard?seen={seen}&wait={_WAIT if seen else 0}"
        shown = self._client.get(path, Dashboard, timeout=_WAIT + _SLACK)
        self._shown, self._version = encode(shown), shown.version


async def serve(feed: Feed, port: int, ready: Callable[[str], None]) -> None:
    """Serve the page at ``127.0.0.1:port`` (0: a free one) until a signal comes; `ready` is called with its URL.

    Raises OSError where nobody may listen there.
    """
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    secret = secrets.token_urlsafe(32)
    with socket.create_server(("127.0.0.1", port)) as listener:
        runner = web.AppRunner(page_app(feed, secret), access_log=None, shutdown_timeout=_SHUTDOWN)
        await runner.setup()
        try:
            await web.SockSite(runner, listener).start()
            ready(f"http://127.0.0.1:{listener.getsockname()[1]}/{secret}/")
            await stop.wait()
        finally:
            await runner.cleanup()


def page_app(feed: Feed, secret: str) -> web.Application:
    """The page and what it shows, for whoever has the secret."""

    async def state(request: web.Request) -> web.Response:
        try:
            return web.Response(body=await feed.newer(request.query.get("seen", "")), content_type=JSON)
        except HpcError as error:
            return web.Response(status=503, body=encode(error.report()), content_type=ERROR)

    async def file(request: web.Request) -> web.Response:
        name = request.match_info["file"] or "dashboard.html"
        if name not in PAGE:
            raise web.HTTPNotFound
        return web.Response(body=feed.file(name), content_type=PAGE[name], charset="utf-8")

    app = web.Application(middlewares=[_guard(secret)])
    for path, handler in (("state", state), ("{file:[^/]*}", file)):
        app.router.add_get(f"/{secret}/{path}", handler, allow_head=False)
    return app


def _guard(secret: str) -> Middleware:
    """Refuses who does not know the secret, and who was led here under another name or by another page."""

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        given, origin = request.path[1:].partition("/")[0], request.headers.get("Origin")
        known = secrets.compare_digest(given.encode("utf-8", "replace"), secret.encode())
        ours = request.host.partition(":")[0] in _NAMES and origin in (None, f"http://{request.host}")
        if not (known and ours):
            raise web.HTTPForbidden(text="nnsight-hpc dashboard prints the address of this page.", headers=_HEADERS)
        response = await handler(request)
        response.headers.update(_HEADERS)
        return response

    return check


def _in_thread(work: Callable[[], None]) -> asyncio.Future[None]:
    """The end of `work` in a thread that does not keep the program from ending, as those of an executor do."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()

    def finish(error: Exception | None) -> None:
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)

    def run() -> None:
        error = None
        try:
            work()
        except Exception as raised:  # noqa: BLE001 - for whoever waits
            error = raised
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(finish, error)

    threading.Thread(target=run, daemon=True, name="feed").start()
    return future
