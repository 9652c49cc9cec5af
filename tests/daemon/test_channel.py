"""The channel of workers under attack: what is garbled, recorded and sent again, or in the clear is refused and logged."""

from __future__ import annotations

import socket
import ssl
import threading
from contextlib import suppress

import pytest

from nnsight_hpc.daemon.certificate import SERVER_NAME
from nnsight_hpc.wire.errors import Conflict, InvalidInput, Unreachable
from nnsight_hpc.wire.http import HttpClient
from nnsight_hpc.wire.messages import RequestStatus, encode
from nnsight_hpc.wire.states import ReplicaState, RequestState
from nnsight_hpc.wire.workers import Orders, Outcome, WorkerReport
from tests.daemon.process import Worker, send, wait_for

LIMIT = 120
"""Seconds for what takes none."""
REFUSED = "a connection of a worker was refused before it began"
GARBLED = "its bytes are not those that were sent"


class Listener:
    """A worker's connection through a relay that keeps what the worker sends, and may change a byte of it."""

    def __init__(self, daemon):
        self._record, self.sent, self.garble = daemon.lease(), bytearray(), False
        context = ssl.create_default_context(cadata=self._record.certificate)
        context.minimum_version = ssl.TLSVersion.TLSv1_3

        def connect():
            ours, theirs = socket.socketpair()
            server = socket.create_connection((self._record.address, self._record.port), timeout=LIMIT)
            threading.Thread(target=self._copy, args=(theirs, server, self._take), daemon=True).start()
            threading.Thread(target=self._copy, args=(server, theirs, bytes), daemon=True).start()
            ours.settimeout(LIMIT)
            return context.wrap_socket(ours, server_hostname=SERVER_NAME)

        secret = daemon.places.secret.read_text()
        headers = {"Authorization": f"Bearer {secret}", "X-NNsight-Epoch": str(self._record.epoch)}
        self.http = HttpClient(connect, peer="the daemon", headers=headers)

    def _copy(self, source, sink, change):
        with source, sink, suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(change(data))
            sink.shutdown(socket.SHUT_WR)

    def _take(self, data):
        self.sent += data
        return bytes([*data[:-1], data[-1] ^ 1]) if self.garble else data

    def replay(self):
        """Send all that the worker sent again, over a connection of one's own; what comes back."""
        with socket.create_connection((self._record.address, self._record.port), timeout=LIMIT) as stream:
            stream.sendall(self.sent)
            return b"".join(iter(lambda: _received(stream), b""))


def _received(stream):
    try:
        return stream.recv(1 << 16)
    except ConnectionError:
        return b""


def post(listener, worker, state):
    report = WorkerReport(replica=worker.replica, state=state)
    return listener.http.call("POST", "/w1/report", report, timeout=LIMIT)


def test_a_recorded_connection_that_is_sent_again_is_refused_and_logged(daemon, worker, request_id):
    """Every byte that a worker sent, sent once more: the handshake fails, and nothing happens a second time."""
    listener = Listener(daemon)
    send(daemon.people(), request_id)
    lease = worker.lease()
    worker.started(lease)
    outcome = Outcome(id=lease.id, attempt=lease.attempt, result_bytes=0)
    listener.http.call("POST", f"/w1/outcomes?replica={worker.replica}", encode([outcome]), timeout=LIMIT)
    before = daemon.people().get(f"/v1/requests/{request_id}", RequestStatus)
    assert b"HTTP" not in listener.replay()
    wait_for(lambda: REFUSED in daemon.log())
    assert daemon.people().get(f"/v1/requests/{request_id}", RequestStatus) == before


def test_a_message_that_is_said_again_changes_nothing(daemon, worker, request_id):
    """Even with the secret: an outcome of a request that has ended is acknowledged, or refused, and the result stays."""
    send(daemon.people(), request_id)
    lease = worker.lease()
    worker.finish(lease, b"first")
    before = daemon.people().get(f"/v1/requests/{request_id}", RequestStatus)
    again = Worker(daemon, worker.replica)
    again.outcome(Outcome(id=lease.id, attempt=1, cancelled=True))
    with pytest.raises(Conflict, match="does not count"):
        again.outcome(Outcome(id=lease.id, attempt=0))
    assert daemon.people().get(f"/v1/requests/{request_id}", RequestStatus) == before
    assert before.state == RequestState.COMPLETED


def test_one_garbled_bit_ends_the_connection_and_is_logged(daemon, worker):
    """TLS notices, the worker is told nothing, and its next connection is served."""
    listener = Listener(daemon)
    post(listener, worker, ReplicaState.BUSY)
    listener.garble = True
    with pytest.raises(Unreachable):
        post(listener, worker, ReplicaState.READY)
    wait_for(lambda: GARBLED in daemon.log())
    assert worker.report(ReplicaState.READY) == Orders()


def test_a_call_for_another_daemon_is_refused_and_logged(daemon, worker):
    """What was said to a daemon of an older epoch does not count for the next one."""
    with pytest.raises(Unreachable, match="has epoch 1"):
        daemon.tls(epoch=0).call("POST", f"/w1/lease?replica={worker.replica}")
    assert "refused POST /w1/lease from 127.0.0.1: epoch 0" in daemon.log()


@pytest.mark.parametrize(
    "said", [b"POST /w1/report HTTP/1.1\r\nHost: d\r\n\r\n", bytes(range(256)), b"\x16\x03\x01\x00\x05hello"]
)
def test_what_is_no_tls_is_refused_and_logged(daemon, said):
    """Plain HTTP, noise, and half a handshake: no answer that says anything, and a line in the log."""
    record, before = daemon.lease(), daemon.log().count(REFUSED)
    with socket.create_connection((record.address, record.port), timeout=LIMIT) as stream:
        stream.sendall(said)
        stream.shutdown(socket.SHUT_WR)
        assert b"HTTP" not in b"".join(iter(lambda: _received(stream), b""))
    wait_for(lambda: daemon.log().count(REFUSED) > before)


def test_an_older_tls_is_refused(daemon):
    """Version 1.3 is the least."""
    record = daemon.lease()
    context = ssl.create_default_context(cadata=record.certificate)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection((record.address, record.port), timeout=LIMIT) as plain, pytest.raises(ssl.SSLError):
        context.wrap_socket(plain, server_hostname=SERVER_NAME)


@pytest.mark.parametrize("said", [b"", b"{", b'{"replica": 3}', b"\xff" * 9])
def test_a_message_that_is_none_is_refused_and_logged(daemon, worker, said):
    """With the secret, but no JSON of that form."""
    with pytest.raises(InvalidInput, match="not a valid WorkerReport"):
        worker.http.call("POST", "/w1/report", said)
    assert "refused POST /w1/report from 127.0.0.1: not a valid WorkerReport" in daemon.log()


@pytest.mark.parametrize(
    "said",
    [
        b"no request at all\r\n\r\n",
        b"POST /w1/report HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"POST /w1/report HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\nabc",
    ],
)
def test_http_that_is_none_is_refused(daemon, said):
    """Over good TLS: answered with 400, and the connection is closed."""
    stream = daemon.tls()._open_stream()
    with stream:
        stream.sendall(said)
        answer = b"".join(iter(lambda: _received(stream), b""))
    assert answer.startswith((b"HTTP/1.0 400", b"HTTP/1.1 400"))
