"""A way to the login node that is cut again and again: a TCP relay that hangs up after so many bytes."""

from __future__ import annotations

import socket
from contextlib import suppress
from threading import Lock, Thread
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from nnsight_hpc.client.config import Cluster
    from tests.client.sshd import Sshd


class CuttingRelay:
    """Relays to an sshd; each time `every` more bytes have come from there, all connections end, `cuts` times.

    `brought` counts the bytes that came from there.
    """

    def __init__(self, sshd: Sshd, environment: dict[str, str], *, every: int, cuts: int) -> None:
        self._sshd, self._environment, self._every, self._most = sshd, environment, every, cuts
        self.brought, self.cuts, self._since = 0, 0, 0
        self._open: set[socket.socket] = set()
        self._lock = Lock()

    def __enter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        self._cut()

    def profile(self, transport: str) -> Cluster:
        """The login node by this way."""
        kind, key, *_ = (self._sshd.folder / "hostkey.pub").read_text().split()
        known = self._sshd.folder / f"known_{self.port}"
        known.write_text(f"[127.0.0.1]:{self.port} {kind} {key}\n")
        more = {"port": self.port, "known_hosts": str(known)}
        return self._sshd.profile(transport, environment=self._environment, **more)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection((self._sshd.host, self._sshd.port))
            with self._lock:
                self._open |= {near, far}
            for source, target, counts in ((near, far, False), (far, near, True)):
                Thread(target=self._relay, args=(source, target, counts), daemon=True).start()

    def _relay(self, source: socket.socket, target: socket.socket, counts: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
                if counts and self._full(len(data)):
                    self._cut()
        for end in (source, target):
            _hang_up(end)

    def _full(self, count: int) -> bool:
        with self._lock:
            self.brought += count
            self._since += count
            if self._since < self._every or self.cuts == self._most:
                return False
            self._since = 0
            self.cuts += 1
            return True

    def _cut(self) -> None:
        with self._lock:
            ended, self._open = self._open, set()
        for end in ended:
            _hang_up(end)


def _hang_up(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()
