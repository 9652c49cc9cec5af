"""The synchronous HTTP client against a real aiohttp server on a Unix socket."""

import asyncio
import socket
import threading

import msgspec
import pytest
from aiohttp import web

from nnsight_hpc.wire.errors import NotFound, Unreachable
from nnsight_hpc.wire.http import ERROR, HttpClient
from nnsight_hpc.wire.messages import ModelIdentity


async def _echo(request):
    return web.Response(body=await request.read(), content_type="application/json")


async def _missing(_request):
    report = NotFound("no such pool", next="nnsight-hpc up").report()
    return web.Response(status=404, body=msgspec.json.encode(report), content_type=ERROR)


async def _hang_up(request):
    request.transport.abort()
    return web.Response()


async def _short(request):
    response = web.StreamResponse(headers={"Content-Length": "1000"})
    await response.prepare(request)
    await response.write(b"only this")
    request.transport.close()
    return response


async def _html(_request):
    return web.Response(status=500, text="<h1>a proxy</h1>", content_type="text/html")


async def _close_after(_request):
    response = web.Response(body=b"1")
    response.force_close()
    return response


@pytest.fixture
def server(tmp_path):
    """A server on a Unix socket; gives the function that opens a stream to it."""
    path = str(tmp_path / "s")
    app = web.Application(client_max_size=1 << 30)
    for route, handler in {
        "short": _short,
        "echo": _echo,
        "missing": _missing,
        "hangup": _hang_up,
        "html": _html,
        "close": _close_after,
    }.items():
        app.router.add_route("*", f"/{route}", handler)
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(app)
    loop.run_until_complete(runner.setup())
    loop.run_until_complete(web.UnixSite(runner, path).start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def open_stream():
        stream = socket.socket(socket.AF_UNIX)
        stream.connect(path)
        return stream

    yield open_stream
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(120)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(120)
    loop.close()


@pytest.fixture
def client(server):
    client = HttpClient(server, peer="the test server")
    yield client
    client.close()


def test_large_body_comes_back(client):
    """Bytes go there and back unchanged."""
    body = bytes(range(256)) * 40_000
    assert client.call("PUT", "/echo", body) == body


def test_message_comes_back_as_its_type(client):
    """A message is sent as JSON and read as its type."""
    model = ModelIdentity(id="a", fingerprint="b")
    assert client.put("/echo", model, ModelIdentity) == model


def test_error_of_the_server_is_raised_here(client):
    """An error report becomes the same exception on this side."""
    with pytest.raises(NotFound, match="no such pool"):
        client.call("GET", "/missing")
    assert client.call("PUT", "/echo", b"still usable") == b"still usable"


def test_foreign_error_page_is_unreachable(client):
    """An answer that is not ours (a proxy's page) says who answered what."""
    with pytest.raises(Unreachable, match="the test server answered 500"):
        client.call("GET", "/html")


def test_lost_connection_names_the_peer(client):
    """A server that hangs up gives one clear error."""
    with pytest.raises(Unreachable, match="lost the connection to the test server"):
        client.call("GET", "/hangup")


def test_closed_keep_alive_connection_is_opened_again(client):
    """A connection that the server closed between two calls does not fail the second."""
    assert client.call("GET", "/close") == b"1"
    assert client.call("PUT", "/echo", b"again") == b"again"


def test_nobody_listens(tmp_path):
    """A stream that cannot be opened is Unreachable."""

    def refuse():
        raise ConnectionRefusedError("no")

    with pytest.raises(Unreachable, match="lost the connection to nobody"):
        HttpClient(refuse, peer="nobody").call("GET", "/")


def test_download_of_a_body_that_ends_early_is_noticed(client):
    """A body shorter than its declared length is an error, not a short file."""
    got = []
    with pytest.raises(Unreachable, match="lost the connection"):
        client.download("/short", got.append)
    assert b"".join(got) == b"only this"


@pytest.mark.parametrize(("size", "times"), [(0, 1), (60_000, 1), (70_000, 2)])
def test_a_small_body_is_sent_together_with_the_head(server, size, times):
    """One packet, so that every relay on the way wakes up once; a large body is not copied for it."""
    sent = []

    class Counted(socket.socket):
        def sendall(self, data):
            sent.append(len(data))
            super().sendall(data)

    client = HttpClient(lambda: Counted(fileno=server().detach()), peer="the test server")
    assert client.call("POST", "/echo", b"x" * size) == b"x" * size
    client.close()
    assert len(sent) == times
