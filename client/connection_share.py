"""``nnsight-hpc connect``: one login that later commands use, through a 0600 socket. Each use is one more SSH channel."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from nnsight_hpc.client.launch import wait_until_gone
from nnsight_hpc.client.session import bridge_command, open_stream
from nnsight_hpc.client.share_socket import WANTED, WANTED_FILES, WANTED_IF_RUNNING, share_socket, sharing_process
from nnsight_hpc.client.transport import transport_for
from nnsight_hpc.wire.errors import Conflict, HpcError, NotFound, Unreachable
from nnsight_hpc.wire.messages import encode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from nnsight_hpc.client.config import Cluster
    from nnsight_hpc.client.transport import Transport

LOOK_EVERY = 15.0
"""Seconds between two looks at whether the connection still stands."""


def serve(name: str, cluster: Cluster, ready: Callable[[], None]) -> None:
    """Log in, call `ready`, and offer the connection until a signal ends this process or the connection is lost.

    Raises `Conflict` when another process does so already, whatever stands in the way of a login, and `Unreachable`
    when the connection is lost later.
    """
    path = share_socket(cluster)
    if sharing_process(path) is not None:
        raise Conflict(f"a connection to {name} is open already", next="nnsight-hpc disconnect")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(0))
    transport = transport_for(name, cluster)
    try:
        transport.hold()
        open_stream(transport, bridge_command(cluster), peer=f"{name} ({cluster.host})").close()
        with _listening(path) as listener:
            ready()
            _accept(listener, transport, cluster)
    finally:
        transport.close()
    raise Unreachable(f"the connection to {name} ({cluster.host}) was lost", next="nnsight-hpc connect")


def disconnect(name: str, cluster: Cluster) -> int:
    """End the process that shares a connection to this cluster; its process id. Raises `NotFound` when none does."""
    process = sharing_process(share_socket(cluster))
    if process is None:
        raise NotFound(f"no connection to {name} is open", next=f"nnsight-hpc -c {name} connect")
    os.kill(process, signal.SIGTERM)
    if not wait_until_gone(process, 20):
        raise Unreachable(f"the process {process} that holds the connection to {name} does not end")
    return process


def detach() -> None:
    """Leave the terminal: a session of our own, and nothing more to say."""
    os.setsid()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    os.close(nowhere)


@contextmanager
def _listening(path: Path) -> Iterator[socket.socket]:
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        before = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        try:
            listener.listen()
            yield listener
        finally:
            path.unlink(missing_ok=True)


def _accept(listener: socket.socket, transport: Transport, cluster: Cluster) -> None:
    """Give each local connection a channel of its own, until the SSH connection is lost."""
    listener.settimeout(LOOK_EVERY)
    while True:
        try:
            stream, _ = listener.accept()
        except TimeoutError:
            if not transport.alive():
                return
            continue
        stream.setblocking(True)
        threading.Thread(target=_attach, args=(transport, stream, cluster), daemon=True, name="attach").start()


def _attach(transport: Transport, stream: socket.socket, cluster: Cluster) -> None:
    """A stream whose channel cannot be opened gets the error in place of the hello."""
    spare = stream.dup()
    with spare:
        try:
            wanted = spare.recv(1)
            if wanted not in (WANTED, WANTED_IF_RUNNING, WANTED_FILES):
                stream.close()
                return
            transport.attach(stream, bridge_command(cluster, wanted))
        except HpcError as error:
            with suppress(OSError):  # whoever asked may have gone
                spare.sendall(encode(error.report()) + b"\n")
