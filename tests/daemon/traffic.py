"""Clients that send without pause and workers that finish without pause, while the daemon between them is killed.

What each of them was told is remembered, and compared in the end with what the last daemon knows.
"""

from __future__ import annotations

import random
import threading
import time
from collections import defaultdict
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

from nnsight_hpc.wire.errors import Conflict, HpcError, NotFound, Unreachable
from nnsight_hpc.wire.frames import unpack
from nnsight_hpc.wire.messages import RequestStatus
from nnsight_hpc.wire.names import new_request_id
from nnsight_hpc.wire.states import ReplicaState, RequestState
from tests.daemon.process import Worker, run_frame, send, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from nnsight_hpc.wire.http import HttpClient
    from nnsight_hpc.wire.workers import Lease
    from tests.daemon.process import DaemonProcess

_FRAME = run_frame()


class Traffic:
    """Two clients that send, one that waits for each result, and two workers.

    `sent` were tried, `acknowledged` taken, `cancelled` asked to be cancelled; `finished` has the attempts by request, and
    `answers` what was answered to who waited.
    """

    def __init__(self, daemon: DaemonProcess, seed: int) -> None:
        self._daemon, self._sending, self._working = daemon, threading.Event(), threading.Event()
        self.sent, self.acknowledged, self.cancelled = set[str](), set[str](), set[str]()
        self.finished: dict[str, set[int]] = defaultdict(set)
        self.held: dict[str, list[str]] = {}
        self.answers: dict[str, bytes] = {}
        daemon.up(replicas=2)
        staff = [Worker(daemon, each.id) for each in daemon.replicas(count=2)]
        for worker in staff:
            worker.register()
            worker.report(ReplicaState.READY)
        self._clients = [threading.Thread(target=self._send, args=(seed + one,)) for one in range(2)]
        self._clients.append(threading.Thread(target=self._ask))
        self._workers = [threading.Thread(target=self._work, args=(worker, seed)) for worker in staff]

    def __enter__(self) -> Self:
        self._sending.set()
        self._working.set()
        for thread in [*self._clients, *self._workers]:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._sending.clear()
        self._working.clear()
        for thread in [*self._clients, *self._workers]:
            thread.join()

    def settle(self) -> dict[str, RequestStatus]:
        """Send no more, wait until all that was acknowledged has ended, and say how."""
        self._sending.clear()
        for thread in self._clients:
            thread.join()
        http = self._daemon.people()
        return {name: self._ended(http, name) for name in self.acknowledged}

    @staticmethod
    def _ended(http: HttpClient, name: str) -> RequestStatus:
        status = http.get(f"/v1/requests/{name}", RequestStatus)
        until = time.monotonic() + 120
        while not status.state.ended:
            assert time.monotonic() < until, f"it does not end: {status}"
            status = http.get(f"/v1/requests/{name}?wait=5&seen={status.state}", RequestStatus)
        return status

    def _send(self, seed: int) -> None:
        """One request after another, each until it is acknowledged, some of them twice; some are cancelled."""
        chance = random.Random(seed)
        http = self._daemon.people()
        while self._sending.is_set():
            name = new_request_id()
            self.sent.add(name)
            if self._again(lambda name=name: send(http, name, frame=_FRAME)) is None:
                return
            self.acknowledged.add(name)
            if chance.random() < 0.1:
                self._again(lambda name=name: send(http, name, frame=_FRAME))
            if chance.random() < 0.1:
                self.cancelled.add(name)
                self._again(lambda name=name: http.call("DELETE", f"/v1/requests/{name}"))
            time.sleep(chance.random() * 0.02)

    def _ask(self) -> None:
        """One request after another, each sent until its result is the answer."""
        http = self._daemon.people()
        while self._sending.is_set():
            name = new_request_id()
            self.sent.add(name)
            answer = b""
            while not answer:
                path = f"/v1/requests/{name}?pool=smol&priority=100&wait=2"  # before what the others have sent
                frame = self._again(lambda path=path: http.call("POST", path, _FRAME, timeout=30))
                if frame is None:
                    return
                answer = bytes(unpack(frame)[1])
            self.answers[name] = answer

    def _again(self, call: Callable[[], Any]) -> Any:
        """What `call` gives, once it does; None where the clients are to stop before that."""
        while self._sending.is_set():
            with suppress(Unreachable, OSError):
                return call()
            time.sleep(0.01)
        return None

    def _work(self, worker: Worker, seed: int) -> None:
        chance = random.Random(seed)
        leases: list[Lease] = []
        while self._working.is_set():
            try:
                leases = leases or worker.leases(0.5, most=4, tokens=1000)
                self.held[worker.replica] = [lease.id for lease in leases]
                for lease in leases if chance.random() < 0.3 else ():
                    worker.started(lease)
                while leases:
                    time.sleep(chance.random() * 0.01)
                    self._finish(worker, leases[0], small=chance.random() < 0.7)
                    leases.pop(0)
            except (HpcError, OSError):
                time.sleep(0.01)
                with suppress(HpcError, OSError):
                    worker.reconnect()
                    worker.report(ReplicaState.BUSY, running=tuple(lease.id for lease in leases))

    def _finish(self, worker: Worker, lease: Lease, *, small: bool) -> None:
        """Told until it is taken; what does not count any more, or was not on disk, is given up."""
        result = f"result of {lease.id}".encode()
        with suppress(Conflict, NotFound):
            if small:
                worker.return_small(lease, result)
            else:
                worker.confirm(lease)
                worker.finish(lease, result)
            self.finished[lease.id].add(lease.attempt)


def check(traffic: Traffic, http: HttpClient) -> None:
    """What was acknowledged has ended once, as its sender was told; what has completed has its own result."""
    ended = traffic.settle()
    lost = {name: status for name, status in ended.items() if status.state not in _expected(traffic, name)}
    assert lost == {}
    assert {name: answer for name, answer in traffic.answers.items() if answer.decode() != f"result of {name}"} == {}
    completed = {name for name, status in ended.items() if status.state == RequestState.COMPLETED}
    wait_for(lambda: completed <= traffic.finished.keys())  # their workers may hear of it later than we do
    finished = dict(traffic.finished)  # as it is now: what was not acknowledged may go on
    assert {name: attempts for name, attempts in finished.items() if len(attempts) > 1} == {}
    assert finished.keys() <= traffic.sent
    for name in completed:
        assert http.call("GET", f"/v1/requests/{name}/result").decode() == f"result of {name}"


def _expected(traffic: Traffic, name: str) -> set[RequestState]:
    """A cancel may come after the end."""
    cancelled = {RequestState.CANCELLED} if name in traffic.cancelled else set()
    return {RequestState.COMPLETED} | cancelled
