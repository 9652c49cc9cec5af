"""The one way to reach a daemon, wherever it is."""

from __future__ import annotations

import shlex
import socket
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING

from nnsight_hpc.client import config
from nnsight_hpc.client.config import LOCAL
from nnsight_hpc.client.hello import EndedBeforeHello, read_hello
from nnsight_hpc.client.launch import ensure_daemon, open_socket
from nnsight_hpc.client.patience import PatientClient
from nnsight_hpc.client.share_socket import WANTED, WANTED_FILES, WANTED_IF_RUNNING, share_socket
from nnsight_hpc.wire.errors import HpcError, Unreachable

if TYPE_CHECKING:
    from collections.abc import Callable

    from nnsight_hpc.client.config import Cluster
    from nnsight_hpc.client.transport import Transport


def connect(
    cluster: str | None = None, *, start: bool = True, login: bool = True, patience: float = 0.0
) -> PatientClient:
    """A client of the daemon of `cluster` (argument, else ``$NNSIGHT_HPC_CLUSTER``, else the default, else ``local``).

    The connection is made at the first call, and anew when it was lost: to ``local`` through a Unix socket, else by SSH
    through the bridge on the login node, over a running ``nnsight-hpc connect`` where there is one. `start`: start a
    daemon where none runs. `login`: log in by SSH where no connection is open. `patience`: for how many seconds a daemon
    that was reached once is tried again when it is lost (`client.patience`).

    Raises `NotFound` for an unknown cluster; the calls raise what stands in the way (see `wire.errors`).
    """
    profiles = config.load()
    name = profiles.chosen(cluster)
    profile = profiles.find(name)
    if profile is None:
        return PatientClient(partial(_open_local, start=start), peer="the daemon on this machine", patience=patience)
    return PatientClient(
        Remote(name, profile, start=start, login=login).open,
        peer=f"the daemon on {name} ({profile.host})",
        patience=patience,
    )


def dataset_clients(cluster: str | None = None, *, patience: float = 0.0) -> Callable[..., PatientClient]:
    """Makes clients that read datasets, each with a stream of its own over one way to `cluster` (see `connect`).

    What one has there oneself is read by the bridge, as the user that one is there (`client.files_bridge`); what lies
    with the daemon of somebody else, and what is on this machine, by the daemon, which knows who may see what. Called
    with ``ask=False``, it makes a client for which no person is asked when it has to log in: one login is enough.
    """
    profiles = config.load()
    name = profiles.chosen(cluster)
    profile = profiles.find(name)
    if profile is None:
        return lambda ask=True: connect(LOCAL, patience=patience)  # noqa: ARG005 - there is no login
    remote = Remote(name, profile, files=True)
    peer = f"{name} ({profile.host})"
    return lambda ask=True: PatientClient(partial(remote.open, ask=ask), peer=peer, patience=patience)


def _open_local(*, start: bool) -> socket.socket:
    return open_socket(ensure_daemon("embedded", start=start))


class Remote:
    """Streams to the daemon of one cluster; the SSH connection is kept between them while it lives."""

    def __init__(
        self, name: str, cluster: Cluster, *, start: bool = True, login: bool = True, files: bool = False
    ) -> None:
        self._name, self._cluster, self._login = name, cluster, login
        self._wanted = WANTED_FILES if files else WANTED if start else WANTED_IF_RUNNING
        self._command = bridge_command(cluster, self._wanted)
        self._peer = f"{name} ({cluster.host})"
        self._transport: Transport | None = None
        self._lock = Lock()

    def open(self, *, ask: bool = True) -> socket.socket:
        """A stream on which the other side speaks HTTP; its hello has been read and checked.

        `ask`: a person may be asked where a login needs it.
        """
        return self._open_shared() or self._open_direct(ask=ask)

    def _open_shared(self) -> socket.socket | None:
        """A stream over the `connect` process's connection, where one runs; else, or when that fails, None."""
        try:
            stream = open_socket(share_socket(self._cluster))
            stream.sendall(self._wanted)
        except OSError:
            return None
        try:
            read_hello(stream, peer=self._peer)
        except EndedBeforeHello:  # a login of our own will tell why
            stream.close()
            return None
        except BaseException:
            stream.close()
            raise
        return stream

    def _open_direct(self, *, ask: bool) -> socket.socket:
        if not self._login:
            raise Unreachable(f"no connection to {self._peer} is open", next=f"nnsight-hpc -c {self._name} connect")
        from nnsight_hpc.client.transport import transport_for  # noqa: PLC0415 - `local` needs no SSH

        with self._lock:
            self._transport = self._transport or transport_for(self._name, self._cluster)
        return open_stream(self._transport, self._command, peer=self._peer, ask=ask)


def bridge_command(cluster: Cluster, wanted: bytes = WANTED) -> str:
    """What a shell on the cluster is given; `wanted` is one of the words of `share_socket`."""
    owner = f" --owner {shlex.quote(cluster.owner)}" if cluster.owner else ""
    files = "" if owner else " --files"  # the files of somebody else are read by his daemon
    return (
        f"{cluster.command} bridge{owner}" + {WANTED: "", WANTED_IF_RUNNING: " --no-start", WANTED_FILES: files}[wanted]
    )


def open_stream(transport: Transport, command: str, *, peer: str, ask: bool = True) -> socket.socket:
    """Run the bridge through `transport` and read its hello; raises what kept it from saying one."""
    ours, theirs = socket.socketpair()
    try:
        attached = transport.attach(theirs, command, ask=ask)
        try:
            read_hello(ours, peer=peer)
        except EndedBeforeHello as ended:
            raise _explained(attached.why_ended(), ended.noise) from None
    except BaseException:
        ours.close()
        raise
    return ours


def _explained(error: HpcError, noise: str) -> HpcError:
    if noise and isinstance(error, Unreachable):
        error.why = f"{error.why}\n{noise[-500:]}".strip()
    return error
