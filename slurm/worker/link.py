"""The worker's side of the daemon's API for workers: a connection that finds the daemon again when it is gone.

The daemon is disposable: it is killed, restarted, or taken over on another login node. ``lease.json`` says where it is;
it is read again for every connection, and a record of an older epoch than one already seen is not followed.
"""

from __future__ import annotations

import logging
import os
import socket
import ssl
import stat
import threading
import time
from typing import TYPE_CHECKING, Any, TypeVar

from nnsight_hpc.wire.errors import (
    Conflict,
    Denied,
    HpcError,
    Incompatible,
    InvalidInput,
    NotFound,
    Unreachable,
)
from nnsight_hpc.wire.files import read_if_there
from nnsight_hpc.wire.http import HttpClient
from nnsight_hpc.wire.messages import LeaseRecord, decode

if TYPE_CHECKING:
    from pathlib import Path

    import msgspec

    from nnsight_hpc.wire.places import Places

T = TypeVar("T")
DECISIVE: tuple[type[HpcError], ...] = (Conflict, Incompatible, InvalidInput, NotFound)
"""What a daemon says on purpose; anything else (it is gone, its disk is full, its secret is newer) may pass."""

_CONNECT_TIMEOUT = 10.0
_NOTICE = 3.0
"""Seconds until a call that is repeated notices that there is hurry."""
logger = logging.getLogger(__name__)


def read_secret(path: Path) -> str:
    """The secret that proves a worker to its daemon.

    Raises
    ------
    NotFound
        There is no such file.
    Denied
        Others than the owner may read it, or it is somebody else's.
    """
    data = read_if_there(path)
    if data is None:
        raise NotFound("the daemon's secret is not there", where=str(path), next="start the daemon, then this worker")
    status = path.stat()
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077 or status.st_uid != os.getuid():
        raise Denied(
            "the daemon's secret is not private, and is not used",
            where=str(path),
            why=f"its owner is uid {status.st_uid} and its mode {mode:04o}",
            next="remove the file and restart the daemon: it makes a new one, which nobody has read",
        )
    return data.decode("ascii", "replace").strip()


class Backoff:
    """The seconds to wait before each further try: 0.5, 1, 2, … 15."""

    def __init__(self) -> None:
        self._next = 0.5

    def next(self) -> float:
        delay, self._next = self._next, min(15.0, self._next * 2)
        return delay


class DaemonAddress:
    """Where the daemon is now, by ``lease.json``; shared by all links of a worker."""

    def __init__(self, places: Places) -> None:
        self._places, self._newest = places, 0

    def read(self) -> LeaseRecord:
        """The current record; raises `Unreachable` when there is none, or only one that has been superseded."""
        where = str(self._places.lease)
        data = read_if_there(self._places.lease)
        if data is None:
            raise Unreachable("no daemon has written where it is", where=where)
        try:
            record = decode(data, LeaseRecord, what="lease record")
        except InvalidInput as error:
            raise Unreachable("the record of where the daemon is cannot be read", where=where, why=error.why) from None
        if record.epoch < self._newest or not record.certificate:
            why = f"its epoch is {record.epoch}, epoch {self._newest} has been seen" if record.certificate else ""
            raise Unreachable("the record of where the daemon is names none for workers", where=where, why=why)
        self._newest = record.epoch
        return record

    def headers(self, record: LeaseRecord) -> dict[str, str]:
        """What proves us to the daemon of `record`, and says which daemon we mean."""
        return {"Authorization": f"Bearer {read_secret(self._places.secret)}", "X-NNsight-Epoch": str(record.epoch)}


class Link:
    """One connection to whichever daemon there is. Used by one thread; `abandon` may be called from any."""

    def __init__(self, address: DaemonAddress) -> None:
        self._address = address
        self._client: HttpClient | None = None
        self._stream: ssl.SSLSocket | None = None
        self._abandoned = threading.Event()
        self._lock = threading.Lock()
        self._absent = False

    def once(self, path: str, body: bytes | msgspec.Struct | None, as_type: type[T], *, timeout: float = 30.0) -> T:
        """One call, repeated only over a new connection when the one that we had is dead.

        Raises the daemon's own error, or `Unreachable`.
        """
        reused = self._client is not None
        try:
            return self._over_this_connection(path, body, as_type, timeout)
        except Unreachable:
            if not reused:
                raise
            return self._over_this_connection(path, body, as_type, timeout)

    def _over_this_connection(
        self, path: str, body: bytes | msgspec.Struct | None, as_type: type[T], timeout: float
    ) -> T:
        try:
            if self._client is None:
                self._client = self._new_client()
            answer = decode(self._client.call("POST", path, body, timeout=timeout), as_type, what="answer")
        except DECISIVE:
            self._note_present()
            raise
        except HpcError as error:
            self.close()  # the next call reads again where the daemon is, and its secret
            self._note_absent(error)
            raise
        self._note_present()
        return answer

    def call(
        self,
        path: str,
        body: bytes | msgspec.Struct | None,
        as_type: type[T],
        *,
        timeout: float = 30.0,
        decisive: tuple[type[HpcError], ...] = DECISIVE,
        hurry: threading.Event | None = None,
        grace: float = 0.0,
        latest: float = float("inf"),
    ) -> T:
        """Repeat the call until the daemon has answered it.

        Raises the daemon's own error when it is one of `decisive`. Raises whatever stands in the way once the link is
        abandoned, or once `hurry` has been set for `grace` seconds, or is set at the time `latest` (since the epoch).
        """
        backoff = Backoff()
        hurried_at: float | None = None
        while True:
            try:
                return self.once(path, body, as_type, timeout=timeout)
            except decisive:
                raise
            except HpcError:
                if hurried_at is None and hurry is not None and hurry.is_set():
                    hurried_at = time.monotonic()
                over = hurried_at is not None and (time.monotonic() >= hurried_at + grace or time.time() >= latest)
                if self._abandoned.is_set() or over:
                    raise
            nap = backoff.next() if hurried_at is None else 0.5
            self._abandoned.wait(nap if hurry is None else min(nap, _NOTICE))

    def abandon(self) -> None:
        """End the call in progress, and each later one, with `Unreachable`."""
        with self._lock:
            self._abandoned.set()
            if self._stream is not None:
                _shut(self._stream)

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def _new_client(self) -> HttpClient:
        record = self._address.read()
        return HttpClient(
            lambda: self._connect(record), peer=f"the daemon on {record.host}", headers=self._address.headers(record)
        )

    def _connect(self, record: LeaseRecord) -> ssl.SSLSocket:
        if self._address.read().nonce != record.nonce:
            raise Unreachable("the daemon has been replaced by another one", where=record.host)
        stream = dial(record)
        with self._lock:
            self._stream = stream
            if self._abandoned.is_set():
                stream.close()
                raise Unreachable("the worker has given this connection up")
        return stream

    def _note_absent(self, error: HpcError) -> None:
        if not self._absent and not self._abandoned.is_set():
            self._absent = True
            logger.warning("the daemon does not answer; trying again until it does\n%s", error)

    def _note_present(self) -> None:
        if self._absent:
            self._absent = False
            logger.info("the daemon answers again")


def dial(record: LeaseRecord) -> ssl.SSLSocket:
    """A TLS connection to the daemon of `record`; only the certificate in the record is accepted."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # the certificate itself is pinned, and login nodes have many names
    context.load_verify_locations(cadata=record.certificate)
    plain = socket.create_connection((record.address or record.host, record.port), timeout=_CONNECT_TIMEOUT)
    try:
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return context.wrap_socket(plain)
    except BaseException:
        plain.close()
        raise


def _shut(stream: Any) -> None:
    """Cut the connection below TLS; `SSLSocket.shutdown` may not be called while another thread reads from it."""
    try:
        socket.socket.shutdown(stream, socket.SHUT_RDWR)
    except OSError:  # it is closed already
        return
