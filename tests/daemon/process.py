"""A daemon in a process of its own, in a home of its own, and connections to it as people and as workers have them."""

from __future__ import annotations

import json
import os
import socket
import ssl
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
import psutil
from safetensors.numpy import save

from nnsight_hpc.daemon.certificate import SERVER_NAME
from nnsight_hpc.graph import capture_graph
from nnsight_hpc.wire.errors import ErrorReport, HpcError, Unreachable, from_report
from nnsight_hpc.wire.frames import pack
from nnsight_hpc.wire.http import HttpClient
from nnsight_hpc.wire.messages import DumpSpec, Hello, LeaseRecord, ModelIdentity, RequestStatus, decode, encode
from nnsight_hpc.wire.places import Places, places_at
from nnsight_hpc.wire.pools import PoolStatus, ReplicaStatus
from nnsight_hpc.wire.states import ReplicaState
from nnsight_hpc.wire.workers import Begun, Lease, Orders, Outcome, WorkerHello, WorkerReport, WorkerWelcome
from tests.local_account import at_work_in

HERE = Path(__file__).parent
LONG = 60.0
"""Seconds that the daemon lets anybody wait at most: what is sure to come is waited for so long."""


class DaemonProcess:
    """Start it with `start`, end it with `stop` or `kill`, as often as needed; leaving the block ends its jobs too."""

    def __init__(self, base: Path, *, job: str = "quiet_job", **settings: Any) -> None:
        self._base, self._job, self._settings = base, job, settings
        self.places: Places = places_at(base / "state" / "embedded")
        self.process: subprocess.Popen[bytes] | None = None
        (base / "run").mkdir(mode=0o700, exist_ok=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()
        while doomed := at_work_in(self._base):  # again: one may have begun another before it was killed
            for process in doomed:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(doomed, timeout=120)  # what they write comes before their folder is removed

    def spawn(self) -> subprocess.Popen[bytes]:
        """One more process for the same home, whether or not another has the lease."""
        self.places.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        environment = {
            **os.environ,
            "NNSIGHT_HPC_HOME": str(self._base / "state"),
            "XDG_RUNTIME_DIR": str(self._base / "run"),
            "PYTHONPATH": str(HERE / "jobs"),
        }
        environment.pop("NNSIGHT_HPC_SCRATCH", None)
        command = [sys.executable, str(HERE / "run_daemon.py"), json.dumps(self._settings), self._job]
        with self.places.log.open("ab") as log:
            return subprocess.Popen(command, env=environment, stderr=log, stdout=log, stdin=subprocess.DEVNULL)

    def start(self) -> Self:
        self.process = self.spawn()
        until = time.monotonic() + 120
        while True:
            try:
                if self.people().get("/v1/hello", Hello, timeout=5).pid == self.process.pid:
                    return self
            except Unreachable:
                pass
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < until, self.log()
            time.sleep(0.02)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(120)

    def log(self) -> str:
        return self.places.log.read_text()

    def lease(self) -> LeaseRecord:
        return decode(self.places.lease.read_bytes(), LeaseRecord)

    def people(self) -> HttpClient:
        def connect() -> socket.socket:
            stream = socket.socket(socket.AF_UNIX)
            try:
                stream.connect(self.lease().socket)
            except OSError as error:
                stream.close()
                raise Unreachable("no daemon", why=str(error)) from None
            return stream

        return HttpClient(connect, peer="the daemon")

    def tls(self, *, secret: str | None = None, epoch: int | None = None) -> HttpClient:
        """A connection as workers have it: the certificate of the lease is the only one that is trusted."""
        record = self.lease()
        context = ssl.create_default_context(cadata=record.certificate)

        def connect() -> socket.socket:
            plain = socket.create_connection((record.address, record.port), timeout=120)
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return context.wrap_socket(plain, server_hostname=SERVER_NAME)

        headers = {
            "Authorization": f"Bearer {secret or self.places.secret.read_text()}",
            "X-NNsight-Epoch": str(record.epoch if epoch is None else epoch),
        }
        return HttpClient(connect, peer="the daemon", headers=headers)

    def up(self, name: str = "smol", **given: Any) -> PoolStatus:
        return self.people().put(f"/v1/pools/{name}", {"model": "org/model", **given}, PoolStatus)

    def replicas(self, pool: str = "smol", *, count: int = 1) -> tuple[ReplicaStatus, ...]:
        """The pool's replicas, the newest last, once so many have jobs: `up` does not wait for ever."""

        def submitted() -> tuple[ReplicaStatus, ...] | None:
            found = self.people().get(f"/v1/pools/{pool}", PoolStatus).replicas
            return found if sum(bool(one.job_id) for one in found) >= count else None

        return wait_for(submitted)

    def newest(self, pool: str = "smol") -> ReplicaStatus:
        """The pool's newest replica, once it has one."""
        return wait_for(lambda: self.people().get(f"/v1/pools/{pool}", PoolStatus).replicas)[-1]

    def worker(self, pool: str = "smol") -> Worker:
        """A worker of the pool's newest replica that is ready."""
        worker = Worker(self, wait_for(lambda: (newest := self.newest(pool)).job_id and newest).id)
        worker.register()
        worker.report(ReplicaState.READY)
        return worker


class Worker:
    """The HTTP calls of one worker."""

    def __init__(self, daemon: DaemonProcess, replica: str) -> None:
        self._daemon, self.replica, self.http = daemon, replica, daemon.tls()

    def reconnect(self) -> None:
        self.http = self._daemon.tls()

    def post(self, path: str, body: Any = None, as_type: Any = dict[str, Any]) -> Any:
        return decode(self.http.call("POST", path, body, timeout=2 * LONG), as_type)

    def register(self) -> WorkerWelcome:
        hello = WorkerHello(replica=self.replica, job_id="", host="n1", pid=1, ranks=1)
        return self.post("/w1/register", hello, WorkerWelcome)

    def report(self, state: ReplicaState, **fields: Any) -> Orders:
        return self.post("/w1/report", WorkerReport(replica=self.replica, state=state, **fields), Orders)

    def lease(self, wait: float = LONG) -> Lease | None:
        leases = self.leases(wait)
        return leases[0] if leases else None

    def leases(self, wait: float = LONG, **limits: int) -> list[Lease]:
        """Several that may share a forward, within `limits` (`most`, `tokens`)."""
        given = "".join(f"&{name}={limit}" for name, limit in limits.items())
        return self.post(f"/w1/lease?replica={self.replica}&wait={wait}{given}", None, list[Lease])

    def started(self, lease: Lease) -> None:
        self.post(f"/w1/started?replica={self.replica}", [Begun(id=lease.id, attempt=lease.attempt)])

    def return_small(self, lease: Lease, result: bytes) -> None:
        """As `finish`, with the result in the message."""
        self.outcome(Outcome(id=lease.id, attempt=lease.attempt, result=result, result_bytes=len(result)))

    def confirm(self, lease: Lease) -> None:
        """Return once the daemon has the lease on its disk."""
        self.post(f"/w1/held?replica={self.replica}&id={lease.id}&attempt={lease.attempt}")

    def finish(self, lease: Lease, result: bytes = b"result") -> None:
        Path(lease.result).write_bytes(result)
        self.outcome(Outcome(id=lease.id, attempt=lease.attempt, result_bytes=len(result)))

    def outcome(self, outcome: Outcome) -> None:
        """Say how one request ended; raises the daemon's error where it does not count."""
        [refused] = self.post(f"/w1/outcomes?replica={self.replica}", [outcome], list[ErrorReport | None])
        if refused is not None:
            raise from_report(refused)


def run_frame(fingerprint: str = "", model: str = "org/model", *, without: str = "", tokens: int = 4) -> bytes:
    """A request that captures one layer's output for a prompt of so many tokens (of 8 bytes)."""
    graph = capture_graph({"a": "model.layers.0.output"}, ModelIdentity(id=model, fingerprint=fingerprint))
    ids = np.arange(tokens, dtype=np.int64).reshape(1, tokens)
    return pack(graph.to_json().encode(), save(dict.fromkeys(sorted(graph.tensor_names() - {without}), ids)))


def dump_frame(name: str, **fields: Any) -> bytes:
    spec = DumpSpec(name=name, captures=("model.layers.0.output",), corpus_fingerprint="f", **fields)
    return pack(encode(spec), b'{"id": "1", "text": "one"}\n{"id": "2", "text": "two"}\n')


def send(http: HttpClient, request: str, pool: str = "smol", frame: bytes | None = None) -> RequestStatus:
    return http.put(f"/v1/requests/{request}?pool={pool}", frame or run_frame(), RequestStatus)


def wait_for(condition: Any, seconds: float = 120.0) -> Any:
    """What `condition` gives once it is true; it may raise our own errors until then."""
    until = time.monotonic() + seconds
    while True:
        try:
            if value := condition():
                return value
        except HpcError:
            if time.monotonic() > until:
                raise
        assert time.monotonic() < until, "it did not come true"
        time.sleep(0.05)
