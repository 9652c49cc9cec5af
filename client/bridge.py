"""The stdio bridge, ``nnsight-hpc bridge``: what ssh runs on the login node, and the one entry point there.

It makes sure that the daemon runs (where that is on another login node, by a bridge there), says hello in one line, and
relays bytes between its stdin and stdout and the daemon's socket until either side closes. It has no state, opens no port,
and uses no CPU while nobody talks.
"""

from __future__ import annotations

import os
import select
import socket
from functools import partial
from typing import TYPE_CHECKING

from nnsight_hpc.client.launch import checked, ensure_daemon, other_host
from nnsight_hpc.client.onward import bridge_on
from nnsight_hpc.client.relay import BLOCK, copying
from nnsight_hpc.client.shared import open_of, shared_socket, uid_of
from nnsight_hpc.wire.errors import HpcError, Unreachable
from nnsight_hpc.wire.http import HttpClient
from nnsight_hpc.wire.messages import Hello, encode

if TYPE_CHECKING:
    from pathlib import Path

STDIN, STDOUT = 0, 1


def run(executor: str, *, owner: str | None = None, start: bool = True, stay: bool = False) -> int:
    """Relay until either side closes; the exit code. An error goes to the other side in place of the hello.

    `owner`: whose daemon it is, where not this user's; then none is started. `stay`: go on to no other login node.
    """
    try:
        uid = os.getuid() if owner is None else uid_of(owner)
        host = None if stay or uid != os.getuid() else other_host(executor)
        if host is not None and (code := bridge_on(host, executor, start=start)) is not None:
            return code
        path = ensure_daemon(executor, start=start) if uid == os.getuid() else shared_socket(executor, uid)
        hello = checked(HttpClient(partial(_connect, path, uid), peer="the daemon").get("/v1/hello", Hello))
        daemon = _connect(path, uid)
    except HpcError as error:
        _write_all(encode(error.report()) + b"\n")
        return error.exit_code
    with daemon:
        _write_all(encode(hello) + b"\n")
        relay(daemon)
    return 0


def _connect(path: Path, uid: int) -> socket.socket:
    try:
        daemon = open_of(path, uid)
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
