"""The stdio bridge, ``nnsight-hpc bridge``: what ssh runs on the login node, and the one entry point there.

It makes sure that the daemon runs, says hello in one line, and relays bytes between its stdin and stdout and the daemon's
socket until either side closes. It has no state, opens no port, and uses no CPU while nobody talks.
"""

from __future__ import annotations

import os
import select
import socket
from functools import partial
from typing import TYPE_CHECKING

from nnsight_hpc.client.launch import ensure_daemon, open_socket
from nnsight_hpc.client.relay import BLOCK, copying
from nnsight_hpc.wire.errors import HpcError, Unreachable
from nnsight_hpc.wire.http import HttpClient
from nnsight_hpc.wire.messages import Hello, encode

if TYPE_CHECKING:
    from pathlib import Path

STDIN, STDOUT = 0, 1


def run(executor: str, *, start: bool = True) -> int:
    """Relay until either side closes; the exit code. An error goes to the other side in place of the hello."""
    try:
        path = ensure_daemon(executor, start=start)
        hello = HttpClient(partial(open_socket, path), peer="the daemon").get("/v1/hello", Hello)
        daemon = _connect(path)
    except HpcError as error:
        _write_all(encode(error.report()) + b"\n")
        return error.exit_code
    with daemon:
        _write_all(encode(hello) + b"\n")
        relay(daemon)
    return 0


def _connect(path: Path) -> socket.socket:
    try:
        daemon = open_socket(path)
    except OSError as error:
        raise Unreachable("the daemon does not answer", where=str(path), why=str(error)) from error
    daemon.settimeout(None)
    return daemon


def relay(daemon: socket.socket) -> None:
    """Bytes both ways. stdin's end is passed on (the daemon then closes); stdout's reader going ends it at once."""
    copying(partial(os.read, STDIN), daemon.sendall, partial(daemon.shutdown, socket.SHUT_WR))
    poller = select.poll()
    poller.register(daemon, select.POLLIN)
    poller.register(STDOUT, 0)  # hang-up and error are always reported
    while True:
        ready = dict(poller.poll())
        if STDOUT in ready:
            return
        try:
            data = daemon.recv(BLOCK)
            if not data:
                return
            _write_all(data)
        except OSError:
            return


def _write_all(data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(STDOUT, view) :]
