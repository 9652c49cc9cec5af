"""The worker with the real daemon, which starts it, is killed, comes back, and ends it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from nnsight_hpc.execution.values import unpack_values
from nnsight_hpc.storage import ActivationDataset
from nnsight_hpc.wire.errors import HpcError, InvalidGraph
from nnsight_hpc.wire.http import HttpClient
from nnsight_hpc.wire.messages import DatasetStatus, LeaseRecord, RequestStatus, decode
from nnsight_hpc.wire.names import new_request_id
from nnsight_hpc.wire.places import places_at
from nnsight_hpc.wire.pools import PoolSpec, PoolStatus
from tests.slurm.worker.graphs import capture_frame, dump_frame
from tests.slurm.worker.stand_in import wait_for


class Cluster:
    """The embedded daemon in a home of its own, and a client of it."""

    def __init__(self, folder: Path) -> None:
        self.places = places_at(folder / "home" / "embedded")
        self._environment = {
            **os.environ,
            "NNSIGHT_HPC_HOME": str(folder / "home"),
            "XDG_RUNTIME_DIR": str(folder),
        }
        self._log = (folder / "log").open("ab")
        self.http = HttpClient(self._open, peer="the daemon")

    def start(self) -> None:
        command = [sys.executable, "-m", "nnsight_hpc.daemon", "--executor", "embedded"]
        self.process = subprocess.Popen(command, env=self._environment, stdout=self._log, stderr=self._log)
        wait_for(self._answers, "the daemon", 120)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.http.close()

    def put(self, frame: bytes) -> str:
        request = new_request_id()
        self.http.put(f"/v1/requests/{request}?pool=tiny", frame, RequestStatus)
        return request

    def until(self, request: str, *states: str) -> RequestStatus:
        found: list[RequestStatus] = []

        def reached() -> bool:
            found.append(self.http.get(f"/v1/requests/{request}", RequestStatus))
            return found[-1].state in states

        wait_for(reached, f"{request} in {states}", 120)
        return found[-1]

    def _open(self) -> socket.socket:
        record = decode(self.places.lease.read_bytes(), LeaseRecord)
        stream = socket.socket(socket.AF_UNIX)
        stream.connect(record.socket)
        return stream

    def _answers(self) -> bool:
        try:
            self.http.call("GET", "/v1/hello")
        except (HpcError, OSError):
            return False
        return True


@pytest.fixture
def cluster_of_one(tiny_llama):
    """A daemon with a pool of one worker that is ready."""
    with tempfile.TemporaryDirectory(prefix="nnh-w-", dir="/tmp") as folder:  # short: it holds a socket
        cluster = Cluster(Path(folder))
        cluster.start()
        spec = PoolSpec(name="tiny", model=str(tiny_llama))
        cluster.http.put("/v1/pools/tiny", spec, PoolStatus)
        try:
            wait_for(lambda: _state(cluster) == "READY", "a ready replica", 120)
            yield cluster
        finally:
            cluster.http.call("POST", "/v1/stop?workers=1", timeout=60)
            cluster.process.wait(120)


def _state(cluster: Cluster) -> str:
    status = cluster.http.get("/v1/pools/tiny", PoolStatus)
    return status.replicas[-1].state if status.replicas else ""


def _worker(cluster: Cluster) -> psutil.Process:
    job = cluster.http.get("/v1/pools/tiny", PoolStatus).replicas[-1].job_id
    return psutil.Process(int(job.split(":")[0]))


def test_the_whole_life_with_the_real_daemon(cluster_of_one):
    """Run, fail, dump, run beside a dump; kill the daemon while a request runs, get its result from the next one; drain."""
    cluster = cluster_of_one
    worker = _worker(cluster)
    done = cluster.put(capture_frame())
    assert cluster.until(done, "COMPLETED", "FAILED").state == "COMPLETED"
    frame = cluster.http.call("GET", f"/v1/requests/{done}/result")
    assert unpack_values(frame)["hidden"].shape == (1, 5, 32)

    wrong = cluster.put(capture_frame("model.layers.9"))
    cluster.until(wrong, "FAILED")
    with pytest.raises(InvalidGraph, match=r"model\.layers\.9"):
        cluster.http.call("GET", f"/v1/requests/{wrong}/result")

    dump = new_request_id()
    documents = dump_frame(["one two three", "four"], ("model.layers.*.output",), name="d", corpus_fingerprint="c")
    cluster.http.put(f"/v1/datasets/d?pool=tiny&request={dump}", documents, RequestStatus)
    assert cluster.until(dump, "COMPLETED", "FAILED").state == "COMPLETED"
    status = cluster.http.get("/v1/datasets/d", DatasetStatus)
    assert status.complete
    assert len(ActivationDataset(status.path)) == 4

    dump = new_request_id()
    documents = dump_frame(["one two three"] * 20_000, ("model.layers.0.output",), name="e", batch_tokens=6)
    cluster.http.put(f"/v1/datasets/e?pool=tiny&request={dump}", documents, RequestStatus)
    cluster.until(dump, "RUNNING")
    assert cluster.until(cluster.put(capture_frame()), "COMPLETED", "FAILED").state == "COMPLETED"
    status = cluster.until(dump, "RUNNING")
    assert "let others go first" in status.note
    cluster.http.call("DELETE", f"/v1/requests/{dump}")
    cluster.until(dump, "CANCELLED")

    long = cluster.put(capture_frame(forwards=400))
    cluster.until(long, "RUNNING")
    cluster.kill()
    cluster.start()
    assert cluster.until(long, "COMPLETED", "FAILED").state == "COMPLETED"
    assert "hidden" in unpack_values(cluster.http.call("GET", f"/v1/requests/{long}/result"))
    after = cluster.put(capture_frame())
    assert cluster.until(after, "COMPLETED", "FAILED").state == "COMPLETED"
    assert _worker(cluster) == worker

    cancelled = cluster.put(capture_frame(forwards=2500))
    cluster.until(cancelled, "RUNNING")
    cluster.http.call("DELETE", f"/v1/requests/{cancelled}")
    cluster.until(cancelled, "CANCELLED")

    worker.send_signal(signal.SIGUSR2)
    wait_for(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE, "the worker's end", 120)
