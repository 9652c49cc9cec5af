"""A connection to a daemon that may be lost and come back: Wi-Fi, a laptop's sleep, a login node or a daemon that restarts."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

from nnsight_hpc.client.app import note
from nnsight_hpc.client.tables import duration
from nnsight_hpc.wire.errors import Conflict, NotFound, Unreachable
from nnsight_hpc.wire.http import HttpClient

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator

    import msgspec

T = TypeVar("T")

WHILE_WAITING = 600.0
"""Seconds for which a program that waits for a request tries to reach the daemon again; a sleeping machine counts none."""
_QUIET = 3.0
"""Seconds in which a connection may be lost and found without a word."""
_LONGEST_PAUSE = 10.0


class PatientClient(HttpClient):
    """Calls that are made again while the daemon cannot be reached, once it has been reached.

    That is right since each call of our API may be repeated without a second effect.

    Parameters
    ----------
    patience
        For how many seconds; 0: as a plain `HttpClient`.
    """

    def __init__(self, open_stream: Callable[[], socket.socket], *, peer: str, patience: float = 0.0) -> None:
        super().__init__(self._open_again, peer=peer)
        self._open, self.patience, self.reached = open_stream, patience, False

    def call(
        self, method: str, path: str, body: bytes | msgspec.Struct | None = None, *, timeout: float = 60.0
    ) -> bytes:
        """As `HttpClient.call`; the last error, where the daemon stays out of reach for too long."""
        return self._patiently(lambda: super(PatientClient, self).call(method, path, body, timeout=timeout))

    def download(
        self,
        path: str,
        write: Callable[[bytes], object],
        *,
        start: int = 0,
        stop: int | None = None,
        timeout: float = 60.0,
    ) -> None:
        """As `HttpClient.download`, from where it stopped when the connection was lost, as long as more comes each time."""
        position = start

        def take(block: bytes) -> None:
            nonlocal position
            write(block)
            position += len(block)

        while True:
            before = position
            try:
                return self._patiently(
                    lambda: super(PatientClient, self).download(path, take, start=position, stop=stop, timeout=timeout)
                )
            except Unreachable:
                if position == before or not self.patience:
                    raise

    def _patiently(self, attempt: Callable[[], T]) -> T:
        begun, told = 0.0, False
        for pause in _pauses():
            try:
                answer = attempt()
            except Unreachable as error:
                begun = begun or time.monotonic()
                lasted = time.monotonic() - begun
                if not self.reached or lasted >= self.patience:
                    raise
                if lasted > _QUIET and not told:
                    note(f"{error.what}: goes on trying for {duration(self.patience - lasted)}")
                    told = True
            else:
                self.reached = True
                return answer
            time.sleep(pause)
        raise AssertionError("not reached")

    def begin(self, patience: float) -> None:
        """Be as good as new, for another part of the program; a connection that is open is used further."""
        self.patience, self.reached = patience, False

    def _open_again(self) -> socket.socket:
        try:
            stream = self._open()
        except (Conflict, NotFound) as error:  # what a bridge says while the daemon's host is gone and its lease is not
            if not self.reached:
                raise
            raise Unreachable(error.what, where=error.where, why=error.why, next=error.next) from error
        self.reached = True
        return stream


def _pauses() -> Iterator[float]:
    """Seconds between two tries: longer and longer."""
    pause = 0.1
    while True:
        yield pause
        pause = min(2 * pause, _LONGEST_PAUSE)
