"""Large results come from their files, a part of them where that is asked for, and never through the daemon's memory."""

from __future__ import annotations

import os
import re
import socket
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from nnsight_hpc.client.patience import PatientClient
from nnsight_hpc.client.results import fetch_result
from nnsight_hpc.wire.errors import CorruptData
from nnsight_hpc.wire.names import new_request_id
from nnsight_hpc.wire.workers import Outcome
from tests.daemon.process import send
from tests.daemon.unix_session import HOST, unix_session

LARGE = 300 << 20


def _completed(daemon, worker, size: int) -> tuple[str, Path]:
    """A request with a result of so many bytes, and its file: only its last 100 bytes are not zero."""
    name = new_request_id()
    send(daemon.people(), name)
    lease = worker.lease()
    with Path(lease.result).open("wb") as file:
        file.truncate(size)
        file.seek(size - 100)
        file.write(bytes(range(100)))
    worker.outcome(Outcome(id=name, attempt=lease.attempt, result_bytes=size))
    return name, Path(lease.result)


def test_parts_of_a_result(daemon, worker):
    """From a byte on, and for as long as its entity tag is the same; after a change the whole."""
    name, path = _completed(daemon, worker, 5000)
    session, url = unix_session(daemon.lease().socket), f"{HOST}/v1/requests/{name}/result"
    whole = session.get(url)
    assert (whole.status_code, len(whole.content), whole.headers["Accept-Ranges"]) == (200, 5000, "bytes")
    part = session.get(url, headers={"Range": "bytes=4990-", "If-Range": whole.headers["ETag"]})
    assert (part.status_code, part.content) == (206, bytes(range(90, 100)))
    assert part.headers["Content-Range"] == "bytes 4990-4999/5000"
    assert session.get(url, headers={"Range": "bytes=5000-"}).status_code == 416
    changed = session.get(url, headers={"Range": "bytes=4990-", "If-Range": '"other"'})
    assert (changed.status_code, changed.content) == (200, whole.content)
    os.utime(path, (1, 1))
    again = session.get(url, headers={"Range": "bytes=4990-", "If-Range": whole.headers["ETag"]})
    assert (again.status_code, len(again.content)) == (200, 5000)
    path.write_bytes(b"short")
    with pytest.raises(CorruptData, match="as its worker wrote it"):
        daemon.people().call("GET", f"/v1/requests/{name}/result")


def test_a_large_result_does_not_pass_through_the_daemons_memory(daemon, worker):
    """While 300 MB go to two clients at once, the daemon's peak of resident memory stays where it was."""
    name, _ = _completed(daemon, worker, LARGE)
    got = [0, 0]

    def fetch(number: int) -> None:
        def count(block: bytes) -> None:
            got[number] += len(block)

        daemon.people().download(f"/v1/requests/{name}/result", count)

    process = Path(f"/proc/{daemon.process.pid}")
    (process / "clear_refs").write_text("5")  # proc(5): the peak begins anew
    before = _peak(process)
    threads = [threading.Thread(target=fetch, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [LARGE, LARGE]
    assert _peak(process) - before < 30e6


def _peak(process: Path) -> float:
    [kib] = re.findall(r"VmHWM:\s+(\d+) kB", (process / "status").read_text())
    return float(kib) * 1024


class _Cut:
    """Connections to a daemon, each of which is lost after so many bytes of answers; all that came is counted."""

    def __init__(self, path: str, most: int) -> None:
        self._path, self._most, self.bytes, self.opened = path, most, 0, 0

    def open(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        stream = socket.socket(socket.AF_UNIX)
        stream.connect(self._path)
        self.opened += 1
        threading.Thread(target=self._asked, args=(theirs, stream), daemon=True).start()
        threading.Thread(target=self._answered, args=(stream, theirs), daemon=True).start()
        return ours

    def _asked(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):  # it is cut off in between
            while block := source.recv(1 << 16):
                sink.sendall(block)

    def _answered(self, source: socket.socket, sink: socket.socket) -> None:
        left = self._most
        while left and (block := source.recv(min(left, 1 << 16))):
            left -= len(block)
            self.bytes += len(block)
            sink.sendall(block)
        for stream in (source, sink):
            stream.shutdown(socket.SHUT_RDWR)
            stream.close()


def test_a_cut_download_goes_on_where_it_stopped(daemon, worker):
    """However often the connection is lost, each byte of a result comes once."""
    size = 20 << 20
    name, path = _completed(daemon, worker, size)
    cut = _Cut(daemon.lease().socket, most=6 << 20)
    frame = fetch_result(PatientClient(cut.open, peer="the daemon", patience=60), name)
    assert frame == path.read_bytes()
    assert (cut.opened, cut.bytes < size + 10_000) == (4, True)
