"""SSH by paramiko. A channel's bytes are pumped to and from the local socket by one thread each way.

Handing http.client the channel itself would be a fifth faster (67 against 55 MiB/s down, on two cores, where OpenSSH has
168), but a real socket has the timeouts and the shared closing that http.client relies on.
"""

from __future__ import annotations

import logging
import socket
from collections import deque
from contextlib import suppress
from threading import Lock
from typing import TYPE_CHECKING

import paramiko

from nnsight_hpc.client.relay import copying
from nnsight_hpc.client.transport import CONNECT_TIMEOUT
from nnsight_hpc.client.transport.failures import (
    changed_host_key,
    program_ended,
    revoked_host_key,
    unknown_host_key,
    unreachable,
)
from nnsight_hpc.client.transport.keys import Login
from nnsight_hpc.client.transport.known_hosts import read_known_hosts
from nnsight_hpc.client.transport.route import Hop, route
from nnsight_hpc.client.transport.terminal import at_terminal

if TYPE_CHECKING:
    from nnsight_hpc.client.config import Cluster
    from nnsight_hpc.wire.errors import HpcError

WINDOW = 16 << 20
"""Bytes that the other side may send before we have read them: fills a line of 1 Gbit/s at 100 ms."""
KEEPALIVE = 15
"""Seconds between two packets that keep firewalls from forgetting the connection."""
DEAD_AFTER_MS = 60_000
_TYPING_TIMEOUT = 120.0

# What goes wrong is raised in words; without a handler, paramiko's own tracebacks would land on stderr.
logging.getLogger("paramiko").addHandler(logging.NullHandler())


class Paramiko:
    """A `Transport`. Without `hold`, the connection ends with its last channel."""

    def __init__(self, name: str, cluster: Cluster) -> None:
        self._cluster, self._where = cluster, f"cluster {name}, {cluster.host}"
        self._chain: list[paramiko.Transport] = []
        self._held, self._channels, self._lock = False, 0, Lock()

    def hold(self) -> None:
        self._held = True
        with self._lock:
            self._connected()

    def alive(self) -> bool:
        return bool(self._chain) and self._chain[-1].is_active()

    def attach(self, sock: socket.socket, command: str, *, ask: bool = True) -> ParamikoAttached:  # noqa: ARG002 - one login
        try:
            with self._lock:
                channel = self._connected().open_session(window_size=WINDOW, timeout=CONNECT_TIMEOUT)
                channel.settimeout(CONNECT_TIMEOUT)
                channel.exec_command(command)
                self._channels += 1
        except BaseException as error:
            sock.close()
            self._close_unused()
            if isinstance(error, (paramiko.SSHException, OSError, EOFError)):
                raise unreachable(self._cluster, self._where, f"{type(error).__name__}: {error}") from error
            raise
        channel.settimeout(None)
        return ParamikoAttached(self, sock, channel, command)

    def ended(self, attached: ParamikoAttached, status: int | None) -> HpcError:
        """Why a channel's program ended, in words."""
        said = b"".join(attached.said).decode("utf-8", "replace")
        return program_ended(self._cluster, self._where, status=status, said=said, command=attached.command)

    def release(self) -> None:
        """One channel has ended."""
        with self._lock:
            self._channels -= 1
        self._close_unused()

    def close(self) -> None:
        with self._lock:
            self._close()

    def _close_unused(self) -> None:
        with self._lock:
            if not self._channels and not self._held:
                self._close()

    def _close(self) -> None:
        for transport in reversed(self._chain):
            transport.close()
        self._chain = []

    def _connected(self) -> paramiko.Transport:
        if not self.alive():
            self._close()
            through = None
            for hop in route(self._cluster):
                through = self._log_in(hop, through)
                self._chain.append(through)
        return self._chain[-1]

    def _log_in(self, hop: Hop, through: paramiko.Transport | None) -> paramiko.Transport:
        where = f"{self._where} ({hop.user}@{hop.host}, port {hop.port})"
        transport = None
        try:
            stream = _dial(hop) if through is None else _dial_through(through, hop)
            # Not ServiceRequestingTransport: it misses answers that come fast, and waits for ever for a peer that has gone.
            transport = _Connection(stream)
            transport.daemon = True
            self._check_host(transport, hop, where)
            transport.auth_timeout = _TYPING_TIMEOUT if at_terminal() else CONNECT_TIMEOUT
            Login(transport, self._cluster, user=hop.user, where=where).run(hop.files)
            transport.set_keepalive(KEEPALIVE)
        except BaseException as error:
            if transport is not None:
                transport.close()
            self._close()
            lost = transport is not None and transport.lost
            if lost or isinstance(error, (paramiko.SSHException, OSError, EOFError)):
                why = "the connection was lost during the login" if lost else f"{type(error).__name__}: {error}"
                raise unreachable(self._cluster, where, why) from error
            raise
        return transport

    def _check_host(self, transport: paramiko.Transport, hop: Hop, where: str) -> None:
        """Exchange keys, asking for a kind of host key that is known, and refuse a host that is not the known one."""
        known = read_known_hosts(self._cluster.known_hosts)
        trusted = known.of(hop.host, hop.port)
        _prefer(transport, [key.get_name() for key in trusted])
        transport.start_client(timeout=CONNECT_TIMEOUT)
        key = transport.get_remote_server_key()
        offered = f"{key.get_name()} {key.fingerprint}"
        if known.is_revoked(key):
            raise revoked_host_key(where, host=hop.host, offered=offered)
        if not trusted:
            raise unknown_host_key(self._cluster, where, host=hop.host, port=hop.port, offered=offered)
        if key not in trusted:
            shown = ", ".join(f"{one.get_name()} {one.fingerprint}" for one in trusted)
            raise changed_host_key(where, host=hop.host, port=hop.port, offered=offered, known=shown)


class _Connection(paramiko.Transport):  # type: ignore[misc]  # it has no types
    """Knows whether it was lost, which paramiko tells as it tells a refused login. One who refuses says so and then ends."""

    lost = False

    def get_exception(self) -> Exception | None:
        error: Exception | None = super().get_exception()  # which forgets it
        self.lost = self.lost or isinstance(error, (EOFError, OSError))
        return error


_STATUS_TIMEOUT = 5.0
"""How long a program's exit status may take after its last byte, in seconds."""


class ParamikoAttached:
    """A program at the end of a channel; `said` is the end of what it wrote to stderr."""

    def __init__(self, owner: Paramiko, sock: socket.socket, channel: paramiko.Channel, command: str) -> None:
        self.command, self.said = command, deque[bytes](maxlen=64)
        self._owner, self._sock, self._channel = owner, sock, channel
        self._stderr = copying(channel.recv_stderr, self.said.append, lambda: None)
        copying(sock.recv, channel.sendall, channel.shutdown_write)
        copying(channel.recv, sock.sendall, self._end)

    def why_ended(self) -> HpcError:
        self._stderr.join(5)
        ended = self._channel.status_event.wait(_STATUS_TIMEOUT)
        status = self._channel.exit_status if ended else -1
        return self._owner.ended(self, status if status >= 0 else None)

    def _end(self) -> None:
        """The program wrote its last byte, or nobody reads any more."""
        with suppress(OSError):  # it may be closed on the other side
            self._sock.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads from it
        if self._channel.eof_received:  # the exit status follows the last byte; closing before it came would lose it
            self._channel.status_event.wait(_STATUS_TIMEOUT)
        self._channel.close()
        self._sock.close()
        self._owner.release()


def _prefer(transport: paramiko.Transport, kinds: list[str]) -> None:
    """Order algorithms: kinds of host key that are known first, and the authenticated cipher, which is the fastest."""
    options = transport.get_security_options()
    wanted = [algorithm for kind in kinds for algorithm in _ALGORITHMS.get(kind, (kind,))]
    options.key_types = sorted(options.key_types, key=lambda kind: kind not in wanted)
    options.ciphers = sorted(options.ciphers, key=lambda cipher: "gcm" not in cipher)


_ALGORITHMS = {"ssh-rsa": ("rsa-sha2-512", "rsa-sha2-256")}


def _dial(hop: Hop) -> socket.socket:
    sock = socket.create_connection((hop.host, hop.port), timeout=CONNECT_TIMEOUT)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # With keepalive packets on their way, a peer that no longer acknowledges any is found out (paramiko does not look).
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_AFTER_MS)
    return sock


def _dial_through(transport: paramiko.Transport, hop: Hop) -> paramiko.Channel:
    return transport.open_channel(
        "direct-tcpip", (hop.host, hop.port), ("127.0.0.1", 0), window_size=WINDOW, timeout=CONNECT_TIMEOUT
    )
