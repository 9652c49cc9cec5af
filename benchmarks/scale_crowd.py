"""A daemon with many users, pools and simulated workers, all of which speak the real protocol over the real sockets.

The users are numbers above `_FIRST_USER`, members of a group that ``daemon.toml`` lets in: only root can connect as them.
"""

from __future__ import annotations

import os
import random
import socket
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from nnsight_hpc.wire.errors import HpcError
from nnsight_hpc.wire.http import HttpClient
from nnsight_hpc.wire.names import new_request_id
from nnsight_hpc.wire.workers import Begun, Orders, Outcome
from tests.daemon.others import being_number
from tests.daemon.process import DaemonProcess, Worker, run_frame, send

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from nnsight_hpc.wire.workers import Lease

_GROUP, _GID = "users", 100
_FIRST_USER = 60_000
MOST, _TOKENS = 16, 1000
"""What a worker takes at once: requests of one form, and their tokens."""


class Crowd:
    """Users and workers of one daemon; users send for pools by chance, and workers listen for orders until it is killed."""

    def __init__(self, daemon: DaemonProcess, users: int, pools: int) -> None:
        self.daemon = daemon
        with ThreadPoolExecutor(16) as at_once:  # each waits until its job is there
            self.workers: list[Worker] = list(at_once.map(partial(_worker, daemon), [f"p{n}" for n in range(pools)]))
        self.users = [_connected(daemon.lease().socket, _FIRST_USER + number) for number in range(users)]
        for worker in self.workers:
            threading.Thread(target=_listen, args=(Worker(daemon, worker.replica),), daemon=True).start()
        self._chance, self._frame = random.Random(0), run_frame()

    def send(self, user: HttpClient) -> None:
        send(user, new_request_id(), f"p{self._chance.randrange(len(self.workers))}", self._frame)

    def leased(self, times: int) -> list[float]:
        """Seconds until a worker has a request, one worker after the other; each finishes it."""
        taken = []
        for worker in islice(cycle(self.workers), times):
            begun = time.perf_counter()
            leases = worker.leases(0, most=1, tokens=_TOKENS)
            taken.append(time.perf_counter() - begun)
            _finish(worker, leases)
        return taken

    def work(self) -> int:
        """Have all workers lease, run and finish what there is; how many requests that was."""
        for worker in self.workers:
            worker.reconnect()
        with ThreadPoolExecutor(len(self.workers)) as at_once:
            return sum(at_once.map(_work, self.workers))

    def memory(self) -> float:
        """Resident bytes of the daemon's process."""
        assert self.daemon.process is not None
        return float(psutil.Process(self.daemon.process.pid).memory_info().rss)

    def maps_torch(self) -> bool:
        assert self.daemon.process is not None
        return "libtorch" in Path(f"/proc/{self.daemon.process.pid}/maps").read_text()


@contextmanager
def crowd(users: int, pools: int) -> Iterator[Crowd]:
    if os.geteuid() != 0:
        raise SystemExit("only root can connect as many users")
    with tempfile.TemporaryDirectory(prefix="nnh-", ignore_cleanup_errors=True) as folder:
        daemon = DaemonProcess(Path(folder))
        daemon.places.home.mkdir(mode=0o700, parents=True)
        daemon.places.settings.write_text(f'[share]\ngroup = "{_GROUP}"\n')
        with daemon:
            yield Crowd(daemon, users, pools)


def _worker(daemon: DaemonProcess, pool: str) -> Worker:
    daemon.up(pool)
    return daemon.worker(pool)


def _listen(worker: Worker) -> None:
    """Wait for orders, as every worker does beside its work."""
    with suppress(HpcError, OSError):
        while True:
            worker.post(f"/w1/orders?replica={worker.replica}&wait=20", None, Orders)


def _connected(path: str, uid: int) -> HttpClient:
    """A connection that was made as that user; whoever speaks over it later is taken for him."""
    stream = socket.socket(socket.AF_UNIX)
    with being_number(uid, _GID):
        stream.connect(path)
    return HttpClient(lambda: stream, peer=f"the daemon, for {uid}")


def _work(worker: Worker) -> int:
    done = 0
    while leases := worker.leases(0, most=MOST, tokens=_TOKENS):
        _finish(worker, leases)
        done += len(leases)
    return done


def _finish(worker: Worker, leases: Sequence[Lease]) -> None:
    begun = [Begun(id=lease.id, attempt=lease.attempt) for lease in leases]
    worker.post(f"/w1/started?replica={worker.replica}", begun)
    for lease in leases:
        Path(lease.result).write_bytes(b"result")
    outcomes = [Outcome(id=lease.id, attempt=lease.attempt, result_bytes=6, seconds=0.01) for lease in leases]
    worker.post(f"/w1/outcomes?replica={worker.replica}", outcomes, list)
