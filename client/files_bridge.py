"""``nnsight-hpc bridge --files``: one's own datasets, read by the bridge itself and not through the daemon.

The daemon has many to serve, and none of this user's files is closed to him: so what he fetches is read where ssh has
put him, by a process of his own that ends with the stream. It answers the calls of the daemon's interface that read
datasets, on stdin and stdout; bytes of files go from the page cache into the stream without passing through Python.
"""

from __future__ import annotations

import os
import re
import socket
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from importlib.metadata import version
from io import FileIO
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from nnsight_hpc.client.bridge import STDIN, STDOUT
from nnsight_hpc.storage.describe import absent, describe, file_to_fetch, files_to_fetch
from nnsight_hpc.wire.errors import CorruptData, HpcError, NotFound
from nnsight_hpc.wire.http import ERROR, FRAME, JSON
from nnsight_hpc.wire.identity import user_name
from nnsight_hpc.wire.messages import PROTOCOL, Hello, encode
from nnsight_hpc.wire.places import places

if TYPE_CHECKING:
    from io import BufferedReader, BufferedWriter
    from pathlib import Path

    from nnsight_hpc.wire.places import Places

_PATH = re.compile(r"/v1/datasets/([^/]+)(/files(?:/(.+))?)?")
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")
_MOST = 1 << 30
"""Bytes that the kernel is asked to send at once."""


def serve_files(executor: str) -> int:
    """Say hello on stdout, and answer what comes on stdin until the other side closes; the exit code."""
    with open(STDIN, "rb", closefd=False) as asked, open(STDOUT, "wb", closefd=False) as answers:
        try:
            where = places(executor)
        except HpcError as error:
            answers.write(encode(error.report()) + b"\n")
            return error.exit_code
        answers.write(encode(_hello(executor, where)) + b"\n")
        answers.flush()
        with suppress(OSError):  # the other side has gone; or it sees the stream's end in a file that cannot be read
            _Handler(asked, answers, where.datasets)
    return 0


def _hello(executor: str, where: Places) -> Hello:
    """As a daemon would say it of itself; there is no lease, and so no epoch."""
    user = user_name(os.getuid())
    return Hello(
        protocol=PROTOCOL,
        version=version("nnsight-hpc"),
        owner=user,
        user=user,
        host=socket.gethostname(),
        pid=os.getpid(),
        epoch=0,
        executor=executor,
        home=str(where.home),
    )


class _Handler(BaseHTTPRequestHandler):
    """The calls of one stream, one after the other."""

    protocol_version = "HTTP/1.1"

    def __init__(self, asked: BufferedReader, answers: BufferedWriter, datasets: Path) -> None:
        self.rfile, self.wfile, self._datasets = asked, answers, datasets
        super().__init__(None, "", None)  # type: ignore[arg-type]  # the streams are there, and there is no server

    def setup(self) -> None:
        """The streams are open."""

    def finish(self) -> None:
        """They are closed by who opened them."""

    def do_GET(self) -> None:
        """A dataset's status, the list of its files, or a file."""
        try:
            found = self._find()
        except HpcError as error:
            self._send_error(error)
        except OSError as error:
            where = str(error.filename or self.path)
            self._send_error(HpcError("the dataset cannot be read", where=where, why=error.strerror or str(error)))
        else:
            if isinstance(found, bytes):
                self._send(200, JSON, found)
            else:
                with found:
                    self._send_file(found)

    def _find(self) -> bytes | FileIO:
        """What is asked for: a message, or a file."""
        if (asked := _PATH.fullmatch(unquote(urlsplit(self.path).path))) is None:
            raise NotFound("the bridge has no such call", where=f"GET {self.path}")
        name, files, path = asked.groups()
        if path:
            return FileIO(file_to_fetch(self._datasets, name, path))
        if files:
            return encode(files_to_fetch(self._datasets, name))
        if (found := describe(self._datasets, name)) is None:
            raise absent(self._datasets, name)
        return encode(found)

    def _send_file(self, file: FileIO) -> None:
        size = os.fstat(file.fileno()).st_size
        asked = _RANGE.fullmatch(self.headers.get("Range", ""))
        start, stop = (int(asked[1]), min(int(asked[2] or size) + 1, size)) if asked else (0, size)
        if asked and start >= stop:
            why = f"it has {size} bytes, asked for are {asked[0]}"
            self._send_error(CorruptData("a file of the dataset is shorter than it was", where=self.path, why=why))
            return
        if asked:
            self._begin(206, FRAME, stop - start, Content_Range=f"bytes {start}-{stop - 1}/{size}")
        else:
            self._begin(200, FRAME, size)
        self.wfile.flush()
        out = self.wfile.fileno()
        while start < stop and (count := os.sendfile(out, file.fileno(), start, min(stop - start, _MOST))):
            start += count
        self.close_connection = start < stop  # a file that became shorter: the other side sees the end of the stream

    def _send_error(self, error: HpcError) -> None:
        self._send(error.http_status, ERROR, encode(error.report()))

    def _send(self, code: int, kind: str, body: bytes) -> None:
        self._begin(code, kind, len(body))
        self.wfile.write(body)

    def _begin(self, code: int, kind: str, length: int, **headers: str) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: stderr is for errors."""
