"""The one way in which our synchronous programs (client, worker) speak HTTP: http.client over any byte stream.

A stream is a connected socket, or what looks like one: a Unix socket, one end of a pair whose other end is ssh, a TLS
connection. One `HttpClient` is one connection; it is opened when needed, kept alive, and not shared between threads.
"""

from __future__ import annotations

import http.client
from typing import TYPE_CHECKING, TypeVar

from nnsight_hpc.wire.errors import ErrorReport, HpcError, Unreachable, from_report
from nnsight_hpc.wire.messages import decode, encode

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping

    import msgspec

T = TypeVar("T")
JSON = "application/json"
FRAME = "application/octet-stream"
ERROR = "application/problem+json"
"""Content type of an `ErrorReport`; the name is that of RFC 9457, the fields are ours."""


_SMALL = 64 << 10
"""Bytes of a body up to which it is sent together with the head."""


class _Connection(http.client.HTTPConnection):
    """Sends the head of a request and a small body at once: the other side, and each relay on the way, wakes up once."""

    def __init__(self, open_stream: Callable[[], socket.socket], timeout: float) -> None:
        super().__init__("nnsight-hpc", timeout=timeout)
        self._open_stream = open_stream
        self._held: list[bytes] | None = None

    def connect(self) -> None:
        self.sock = self._open_stream()
        self.sock.settimeout(self.timeout)

    def ask(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> None:
        """As `request`."""
        self._held = [] if body is not None and len(body) <= _SMALL else None
        try:
            self.request(method, path, body, headers)
        finally:
            held, self._held = self._held, None
        if held:
            self.send(b"".join(held))

    def send(self, data: bytes) -> None:  # type: ignore[override]  # all that `ask` has sent
        if self._held is None:
            super().send(data)
        else:
            self._held.append(data)


class HttpClient:
    """Calls to one server over one connection.

    Parameters
    ----------
    open_stream
        Makes a connected stream; called again after the connection was lost. May raise any `HpcError`.
    peer
        Whom we talk to, for messages.
    headers
        Sent with every call (a worker's secret and epoch).
    """

    def __init__(
        self, open_stream: Callable[[], socket.socket], *, peer: str, headers: Mapping[str, str] | None = None
    ) -> None:
        self._open_stream, self._peer, self._headers = open_stream, peer, dict(headers or {})
        self._connection: _Connection | None = None

    def call(
        self, method: str, path: str, body: bytes | msgspec.Struct | None = None, *, timeout: float = 60.0
    ) -> bytes:
        """The response's body. Raises the server's own error, or `Unreachable` when the connection fails.

        Every call of our API may be repeated without a second effect, so one that meets a connection that
        the other side has closed in the meantime is sent once more over a new one.
        """
        response = self._send(method, path, body, timeout)
        try:
            return response.read()
        except (OSError, http.client.HTTPException) as error:
            raise self._lost(error) from error

    def get(self, path: str, as_type: type[T], *, timeout: float = 60.0) -> T:
        return decode(self.call("GET", path, timeout=timeout), as_type, what=f"answer of {self._peer}")

    def put(self, path: str, body: bytes | msgspec.Struct, as_type: type[T], *, timeout: float = 60.0) -> T:
        return decode(self.call("PUT", path, body, timeout=timeout), as_type, what=f"answer of {self._peer}")

    def download(
        self,
        path: str,
        write: Callable[[bytes], object],
        *,
        start: int = 0,
        stop: int | None = None,
        timeout: float = 60.0,
    ) -> None:
        """Hand the bytes from `start` to `stop` (an HTTP range) to `write`, a block at a time, or raise `Unreachable`."""
        asked = f"bytes={start}-" if stop is None else f"bytes={start}-{stop - 1}"
        response = self._send("GET", path, None, timeout, {} if asked == "bytes=0-" else {"Range": asked})
        try:
            while block := response.read(1 << 20):
                write(block)
        except (OSError, http.client.HTTPException) as error:
            raise self._lost(error) from error
        if response.length:  # http.client takes an early end of the body for its end
            raise self._lost(http.client.IncompleteRead(b"", response.length))

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _send(
        self,
        method: str,
        path: str,
        body: bytes | msgspec.Struct | None,
        timeout: float,
        headers: Mapping[str, str] | None = None,
    ) -> http.client.HTTPResponse:
        reused = self._connection is not None
        try:
            response = self._send_once(method, path, body, timeout, headers or {})
        except (OSError, http.client.HTTPException) as error:
            self.close()
            if not reused or isinstance(error, TimeoutError):
                raise self._lost(error) from error
            try:
                response = self._send_once(method, path, body, timeout, headers or {})
            except (OSError, http.client.HTTPException) as again:
                raise self._lost(again) from again
        if response.status >= 400:
            raise self._error(response)
        return response

    def _send_once(
        self,
        method: str,
        path: str,
        body: bytes | msgspec.Struct | None,
        timeout: float,
        headers: Mapping[str, str],
    ) -> http.client.HTTPResponse:
        if self._connection is None:
            self._connection = _Connection(self._open_stream, timeout)
        if self._connection.sock is not None:
            self._connection.sock.settimeout(timeout)
        data = body if body is None or isinstance(body, bytes) else encode(body)
        content = {} if data is None else {"Content-Type": FRAME if body is data else JSON}
        self._connection.ask(method, path, data, {**self._headers, **content, **headers})
        return self._connection.getresponse()

    def _error(self, response: http.client.HTTPResponse) -> HpcError:
        body = response.read()
        if response.headers.get_content_type() == ERROR:
            return from_report(decode(body, ErrorReport, what="error report"))
        return Unreachable(
            f"{self._peer} answered {response.status} {response.reason}", why=body[:300].decode("utf-8", "replace")
        )

    def _lost(self, error: Exception) -> Unreachable:
        self.close()
        return Unreachable(f"lost the connection to {self._peer}", why=f"{type(error).__name__}: {error}")
