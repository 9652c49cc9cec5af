"""The worker with the real daemon, which starts it, is killed, comes back, and ends it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from nnsight_hpc.execution.values import unpack_values
from nnsight_hpc.models import load
from nnsight_hpc.slurm.worker.allowance import Allowance
from nnsight_hpc.slurm.worker.dumps import Dumps, Orders
from nnsight_hpc.slurm.worker.model import Alone
from nnsight_hpc.storage import ActivationDataset, read_attributes, read_manifest
from nnsight_hpc.wire.dumps import DumpStatus
from nnsight_hpc.wire.errors import HpcError, InvalidGraph
from nnsight_hpc.wire.http import HttpClient
from nnsight_hpc.wire.messages import DatasetStatus, LeaseRecord, RequestStatus, decode
from nnsight_hpc.wire.names import new_request_id
from nnsight_hpc.wire.places import places_at
from nnsight_hpc.wire.pools import PoolSpec, PoolStatus
from nnsight_hpc.wire.workers import Lease
from tests.local_account import outlasting
from tests.models_for_tests import WORDS
from tests.slurm.worker.graphs import MINUTES, capture_frame, dump_frame, endless_frame
from tests.slurm.worker.shared_slices import Board
from tests.slurm.worker.stand_in import wait_for
from tests.slurm.worker.test_dump import run, texts
from tests.storage.contents import contents


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
    with _cluster(tiny_llama, 1) as cluster:
        yield cluster


@pytest.fixture
def cluster_of_two(tiny_llama):
    """A daemon with a pool of two workers that are ready."""
    with _cluster(tiny_llama, 2) as cluster:
        yield cluster


@contextmanager
def _cluster(model: Path, replicas: int):
    with tempfile.TemporaryDirectory(prefix="nnh-w-", dir="/tmp") as folder:  # short: it holds a socket
        cluster = Cluster(Path(folder))
        cluster.start()
        spec = PoolSpec(name="tiny", model=str(model), replicas=replicas)
        cluster.http.put("/v1/pools/tiny", spec, PoolStatus)
        try:
            wait_for(lambda: _states(cluster) == ["READY"] * replicas, "ready replicas", 120)
            yield cluster
        finally:
            cluster.http.call("POST", "/v1/stop?workers=1", timeout=60)
            cluster.process.wait(120)
            assert outlasting(Path(folder)) == []


def _states(cluster: Cluster) -> list[str]:
    return [replica.state for replica in cluster.http.get("/v1/pools/tiny", PoolStatus).replicas]


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
    documents = dump_frame(["one two three"] * MINUTES, ("model.layers.0.output",), name="e", batch_tokens=6)
    cluster.http.put(f"/v1/datasets/e?pool=tiny&request={dump}", documents, RequestStatus)
    cluster.until(dump, "RUNNING")
    assert cluster.until(cluster.put(capture_frame()), "COMPLETED", "FAILED").state == "COMPLETED"
    status = cluster.until(dump, "RUNNING")
    assert "let others go first" in status.note
    cluster.http.call("DELETE", f"/v1/requests/{dump}")
    cluster.until(dump, "CANCELLED")

    long = cluster.put(capture_frame(forwards=400))
    cluster.until(long, "RUNNING", "COMPLETED")
    cluster.kill()
    cluster.start()
    assert cluster.until(long, "COMPLETED", "FAILED").state == "COMPLETED"
    assert "hidden" in unpack_values(cluster.http.call("GET", f"/v1/requests/{long}/result"))
    after = cluster.put(capture_frame())
    assert cluster.until(after, "COMPLETED", "FAILED").state == "COMPLETED"
    assert _worker(cluster) == worker

    cancelled = cluster.put(endless_frame())
    cluster.until(cancelled, "RUNNING")
    cluster.http.call("DELETE", f"/v1/requests/{cancelled}")
    cluster.until(cancelled, "CANCELLED")

    worker.send_signal(signal.SIGUSR2)
    wait_for(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE, "the worker's end", 120)


@pytest.mark.slow
def test_two_workers_write_one_dataset_though_one_is_killed(cluster_of_two, tiny_llama, tmp_path):
    """The idle worker of a pool helps; what the other leaves undone by SIGKILL is written; the bytes are those of one."""
    cluster, dump = cluster_of_two, new_request_id()
    documents = [" ".join(WORDS[n % 7 :] * 20)[: 900 - n % 100] for n in range(3000)]
    frame = dump_frame(documents, ("model.layers.0.output",), name="both", batch_tokens=1024)
    cluster.http.put(f"/v1/datasets/both?pool=tiny&request={dump}", frame, RequestStatus)
    found = wait_for(lambda: _with_two(cluster, "both"), "two workers", 120)
    if not found.complete:  # before that was seen
        _kill(cluster, found.leads)
    assert cluster.until(dump, "COMPLETED", "FAILED").state == "COMPLETED"
    one, two = tmp_path / "both.zarr", Path(found.path)
    assert cluster.until(dump, "COMPLETED").progress.tokens == read_attributes(two).rows
    lease = Lease(id=dump, kind="dump", attempt=1, request="", result="", user="me")
    orders = Orders(cancelled=lambda: False, gives_way=lambda: False)
    Dumps(Alone(load(str(tiny_llama))), Board().slices("w")).run(lease, frame, tmp_path, Allowance(None), orders)
    assert _arrays(one) == _arrays(two)
    entries = [[entry for entry in read_manifest(path) if entry.slice is not None] for path in (one, two)]
    same = [[(entry.path, entry.rows, entry.crc32c, entry.slice) for entry in some] for some in entries]
    assert same[0] == same[1]


def _with_two(cluster: Cluster, name: str) -> DumpStatus | None:
    """The dump, once two workers write it, or it is complete."""
    found = cluster.http.get(f"/v1/dumps/{name}", DumpStatus)
    return found if found.complete or (found.leads and len(found.doing) == 2) else None


def _kill(cluster: Cluster, replica: str) -> None:
    """SIGKILL for all processes of its job."""
    replicas = cluster.http.get("/v1/pools/tiny", PoolStatus).replicas
    [job] = [one.job_id for one in replicas if one.id == replica]
    script = psutil.Process(int(job.split(":")[0]))
    for process in [*script.children(recursive=True), script]:
        process.kill()


def _is_complete(cluster: Cluster, dump: str) -> bool:
    return cluster.http.get(f"/v1/requests/{dump}", RequestStatus).state == "COMPLETED"


def _arrays(path: Path) -> dict[str, bytes]:
    """All files of a dataset but its manifest and its own metadata, which name writers and times."""
    files = [file for file in path.rglob("*") if file.is_file() and file.parent != path]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


@pytest.mark.slow
def test_a_dump_outlives_its_worker_and_the_daemon(cluster_of_one, tiny_llama, tmp_path):
    """Both are killed in the middle of it; the next daemon has it written to its end, and it is that of one undisturbed run."""
    cluster, dump, path = cluster_of_one, new_request_id(), cluster_of_one.places.datasets / "long.hdf5"
    [replica] = cluster.http.get("/v1/pools/tiny", PoolStatus).replicas
    options = {"name": "long", "format": "hdf5", "batch_tokens": 1024}
    frame = dump_frame(texts(2200, (40, 90)), ("model.layers.0.output",), **options)
    cluster.http.put(f"/v1/datasets/long?pool=tiny&request={dump}", frame, RequestStatus)
    wait_for(lambda: any((path / "manifest").glob("slice-*.jsonl")) or _is_complete(cluster, dump), "the first slice")
    _kill(cluster, replica.id)
    cluster.kill()
    cluster.start()
    assert cluster.until(dump, "COMPLETED", "FAILED").state == "COMPLETED"
    run(frame, load(str(tiny_llama)), tmp_path)
    assert contents(tmp_path / path.name) == contents(path)
