"""Requests, pools and datasets as people see them, over the Unix socket of a real daemon."""

from __future__ import annotations

import getpass
import json
import socket
import stat
import subprocess
import sys
from pathlib import Path

import google_crc32c
import numpy as np
import psutil
import pytest

from nnsight_hpc.storage import CaptureSpec, DatasetWriter, Provenance, TokenTable
from nnsight_hpc.wire.errors import (
    Conflict,
    ErrorReport,
    HpcError,
    InvalidGraph,
    InvalidInput,
    NotFound,
    RequestCancelled,
)
from nnsight_hpc.wire.frames import pack
from nnsight_hpc.wire.messages import DatasetFile, DatasetStatus, DumpProgress, Hello, ModelIdentity, RequestStatus
from nnsight_hpc.wire.names import new_request_id
from nnsight_hpc.wire.pools import PoolStatus
from nnsight_hpc.wire.states import ReplicaState, RequestState
from nnsight_hpc.wire.workers import Outcome, SlicesOpened
from tests.daemon.process import dump_frame, run_frame, send


def test_hello_names_the_user_whom_the_kernel_names(daemon):
    """The user in the hello is the owner of this process, and the epoch that of the lease."""
    hello = daemon.people().get("/v1/hello", Hello)
    assert (hello.user, hello.epoch, hello.executor) == (getpass.getuser(), daemon.lease().epoch, "embedded")


def test_socket_is_the_owners_alone(daemon):
    """The socket's mode is 0600, in a folder of mode 0700."""
    path = Path(daemon.lease().socket)
    assert (stat.S_IMODE(path.stat().st_mode), stat.S_IMODE(path.parent.stat().st_mode)) == (0o600, 0o700)


def test_up_answers_with_a_job(daemon, worker):
    """A pool's answer names the replica's job, and putting the same again starts nothing."""
    first = daemon.people().get("/v1/pools/smol", PoolStatus)
    again = daemon.up()
    assert [r.id for r in first.replicas] == [r.id for r in again.replicas]
    assert first.replicas[0].job_id.partition(":")[0].isdigit()


def test_a_request_goes_to_a_worker_and_its_result_comes_back(daemon, worker, request_id):
    """QUEUED, LEASED, RUNNING, COMPLETED, each with its time; then the very bytes that the worker wrote."""
    http = daemon.people()
    assert send(http, request_id).state == RequestState.QUEUED
    lease = worker.lease()
    assert (lease.id, lease.attempt, lease.frame) == (request_id, 1, run_frame())
    worker.started(lease)
    with pytest.raises(Conflict, match="has not ended"):
        http.call("GET", f"/v1/requests/{request_id}/result")
    worker.finish(lease, b"the result")
    status = http.get(f"/v1/requests/{request_id}?wait=5&seen=RUNNING", RequestStatus)
    assert list(status.times) == ["RECEIVED", "QUEUED", "LEASED", "RUNNING", "COMPLETED"]
    assert http.call("GET", f"/v1/requests/{request_id}/result") == b"the result"
    part: list[bytes] = []
    http.download(f"/v1/requests/{request_id}/result", part.append, start=4)
    assert b"".join(part) == b"result"


def test_the_same_id_twice_is_one_request(daemon, worker, request_id):
    """Sent again while it waits and after it has ended, a request is not run again."""
    http = daemon.people()
    send(http, request_id)
    assert send(http, request_id).state == RequestState.QUEUED
    lease = worker.lease()
    worker.finish(lease)
    assert send(http, request_id).state == RequestState.COMPLETED
    assert worker.lease(wait=0) is None


def test_requests_are_leased_in_the_order_of_their_coming(daemon, worker):
    """First come, first served; the status says how many are before."""
    http, ids = daemon.people(), [new_request_id() for _ in range(3)]
    assert [send(http, name).position for name in ids] == [0, 1, 2]
    leased = []
    for _ in ids:
        lease = worker.lease()
        worker.finish(lease)
        leased.append(lease.id)
    assert leased == ids


def test_a_lease_whose_answer_was_lost_is_given_again(daemon, worker, request_id):
    """A worker that asks again without having begun gets the same request with the same attempt."""
    send(daemon.people(), request_id)
    first = worker.lease()
    assert worker.lease() == first
    worker.finish(first)


def test_the_error_of_a_failed_request_is_its_result(daemon, worker, request_id):
    """What the worker reported is raised where the result is asked for, also as the exception's own type."""
    http = daemon.people()
    send(http, request_id)
    lease = worker.lease()
    error = ErrorReport("ExecutionFailed", "index 9 is out of range", "nb.py:3", exception="IndexError")
    worker.outcome(Outcome(id=lease.id, attempt=1, error=error))
    with pytest.raises(IndexError, match="out of range"):
        http.call("GET", f"/v1/requests/{request_id}/result")


def test_an_outcome_is_acknowledged_again_and_an_old_attempt_is_refused(daemon, worker, request_id):
    """A worker may repeat its outcome; one of another attempt does not count."""
    send(daemon.people(), request_id)
    lease = worker.lease()
    worker.finish(lease)
    worker.finish(lease)
    with pytest.raises(Conflict, match="does not count"):
        worker.outcome(Outcome(id=lease.id, attempt=2))


def test_a_queued_request_is_cancelled_at_once(daemon, worker, request_id):
    """It ends, its bytes are removed, and no worker gets it."""
    http = daemon.people()
    send(http, request_id)
    status = json.loads(http.call("DELETE", f"/v1/requests/{request_id}"))
    assert (status["state"], worker.lease(wait=0)) == ("CANCELLED", None)
    assert not (daemon.places.requests / f"{request_id}.request").exists()
    with pytest.raises(RequestCancelled):
        http.call("GET", f"/v1/requests/{request_id}/result")


def test_a_running_request_is_cancelled_by_its_worker(daemon, worker, request_id):
    """The worker is told in the answer to its next report, and says when it has given up."""
    http = daemon.people()
    send(http, request_id)
    lease = worker.lease()
    worker.started(lease)
    assert worker.report(ReplicaState.BUSY, running=(lease.id,)).cancel == ()
    http.call("DELETE", f"/v1/requests/{request_id}")
    assert worker.report(ReplicaState.BUSY, running=(lease.id,)).cancel == (request_id,)
    worker.outcome(Outcome(id=lease.id, attempt=1, cancelled=True))
    assert http.get(f"/v1/requests/{request_id}", RequestStatus).state == RequestState.CANCELLED
    assert worker.report(ReplicaState.READY).cancel == ()


def test_an_unknown_pool_names_those_there_are(daemon, worker, request_id):
    """A wrong pool is not found, and the message lists the right ones; nothing is kept of the request."""
    with pytest.raises(NotFound) as caught:
        send(daemon.people(), request_id, pool="small")
    assert "smol" in caught.value.why
    assert not list(daemon.places.requests.glob(f"{request_id}*"))


def test_the_pool_is_found_by_the_models_fingerprint(daemon, worker, request_id):
    """Without a pool the weights decide; another fingerprint than the named pool's is a conflict that shows both."""
    http = daemon.people()
    worker.report(ReplicaState.READY, model=ModelIdentity(id="org/model", fingerprint="f00"))
    status = http.put(f"/v1/requests/{request_id}", run_frame("f00", "whatever"), RequestStatus)
    assert status.pool == "smol"
    worker.finish(worker.lease())
    with pytest.raises(NotFound, match="ba5"):
        http.put(f"/v1/requests/{new_request_id()}", run_frame("ba5"), RequestStatus)
    with pytest.raises(Conflict) as caught:
        send(http, new_request_id(), frame=run_frame("ba5"))
    assert "f00" in caught.value.why
    assert "ba5" in caught.value.why


@pytest.mark.parametrize(
    ("frame", "error"),
    [
        (b"", InvalidInput),
        (b"\xff" * 20, InvalidInput),
        (pack(b"{}"), InvalidGraph),
        (pack(b"not json"), InvalidGraph),
        (run_frame()[:-1], InvalidInput),
        (run_frame(without="input_ids"), InvalidGraph),
        (run_frame().replace(b'"model.output"', b'"os.systemout"'), InvalidGraph),
    ],
    ids=["empty", "no frame", "no graph", "no JSON", "cut short", "missing tensor", "forbidden operation"],
)
def test_a_bad_request_is_refused_and_leaves_nothing(daemon, worker, frame, error):
    """Whatever is wrong with a frame, the sender is told its kind, and no file and no request stays."""
    assert frame != run_frame()
    request_id = new_request_id()
    with pytest.raises(error):
        daemon.people().call("PUT", f"/v1/requests/{request_id}?pool=smol", frame)
    assert not list(daemon.places.requests.glob(f"{request_id}*"))
    with pytest.raises(NotFound):
        daemon.people().get(f"/v1/requests/{request_id}", RequestStatus)


@pytest.mark.parametrize(
    ("method", "path", "body", "error"),
    [
        ("GET", "/v1/nothing", None, NotFound),
        ("POST", "/v1/hello", None, InvalidInput),
        ("GET", "/v1/requests/r-zzzzzzzzzzzz", None, NotFound),
        ("PUT", "/v1/requests/nonsense?pool=smol", b"", InvalidInput),
        ("PUT", "/v1/requests/r-zzzzzzzzzzzz?pool=smol&digest=ab", b"", InvalidInput),
        ("GET", "/v1/pools/smol?wait=soon", None, InvalidInput),
        ("GET", "/v1/pools/smol/log?replica=../../secret", None, NotFound),
        ("PUT", "/v1/pools/a%2Fb", b'{"name":"a/b","model":"m"}', InvalidInput),
        ("PUT", "/v1/pools/x", b'{"name":"x","model":"m","colour":1}', InvalidInput),
        ("PUT", "/v1/pools/x", b'{"name":"y","model":"m","nodes":0}', InvalidInput),
        ("PUT", "/v1/pools/x", b'{"name":"x","model":"m","nodes":2,"tp":1}', InvalidInput),
        ("PUT", "/v1/pools/x", b'{"name":"x","model":"m","tp":3,"gpus_per_node":2}', InvalidInput),
        ("PUT", "/v1/pools/x", b'["model"]', InvalidInput),
        ("PUT", "/v1/pools/x", b"{}", InvalidInput),
        ("POST", "/v1/pools/x/plan", b'{"model":"m","nodes":"two"}', InvalidInput),
        ("POST", "/v1/pools/none/resume", None, NotFound),
        ("GET", "/v1/pools/smol/log?rank=1", None, NotFound),
        ("GET", "/v1/pools/none/log", None, NotFound),
        ("GET", "/v1/datasets/..%2f..", None, InvalidInput),
        ("GET", "/v1/datasets/none", None, NotFound),
    ],
)
def test_bad_calls_get_reports(daemon, method, path, body, error):
    """Every refusal is an error report of the right kind, also what aiohttp itself refuses."""
    with pytest.raises(error):
        daemon.people().call(method, path, body)


def test_a_pool_that_its_executor_refuses_is_not_made(daemon):
    """What the executor says about a wrong specification reaches the user at once, and no pool stays behind."""
    with pytest.raises(InvalidInput, match="asks for 2 nodes"):
        daemon.up("wide", nodes=2, tp=2)
    with pytest.raises(NotFound, match="no pool wide"):
        daemon.people().get("/v1/pools/wide", PoolStatus)


def test_too_many_queued_requests_are_refused(daemon_with):
    """A user's share of the queue is bounded, and what ended makes room."""
    daemon = daemon_with(queued_per_user=2)
    daemon.up()
    http, ids = daemon.people(), [new_request_id() for _ in range(3)]
    send(http, ids[0])
    send(http, ids[1])
    with pytest.raises(Conflict, match="2 requests in the queue"):
        send(http, ids[2])
    http.call("DELETE", f"/v1/requests/{ids[0]}")
    assert send(http, ids[2]).state == RequestState.QUEUED


def test_a_frame_over_the_limit_is_refused(daemon_with, request_id):
    """The limit counts bytes that arrive, whatever the header says."""
    daemon = daemon_with(frame_bytes=1000)
    daemon.up()
    with pytest.raises(InvalidInput, match="1000 bytes"):
        daemon.people().call("PUT", f"/v1/requests/{request_id}?pool=smol", b"x" * 1001)
    stream = socket.socket(socket.AF_UNIX)
    stream.connect(daemon.lease().socket)
    head = f"PUT /v1/requests/{request_id}?pool=smol HTTP/1.1\r\nHost: d\r\nTransfer-Encoding: chunked\r\n\r\n"
    stream.sendall(head.encode() + b"3e9\r\n" + b"x" * 1001 + b"\r\n0\r\n\r\n")
    assert b" 400 " in stream.recv(4096).split(b"\r\n")[0]
    assert not list(daemon.places.requests.iterdir())


def test_another_user_is_denied(daemon):
    """A process of another uid gets nothing, although the socket's permissions were opened for it."""
    path = Path(daemon.lease().socket)
    parents = {folder: folder.stat().st_mode for folder in path.parents if folder != Path("/")}
    for folder, mode in parents.items():
        folder.chmod(mode | 0o111)
    path.chmod(0o666)
    program = (
        "import os, socket, sys; os.setgroups([]); os.setgid(65534); os.setuid(65534); s = socket.socket(socket.AF_UNIX);"
        "s.connect(sys.argv[1]); s.sendall(b'GET /v1/status HTTP/1.1\\r\\nHost: d\\r\\nConnection: close\\r\\n\\r\\n');"
        "print(b''.join(iter(lambda: s.recv(4096), b'')).decode())"
    )
    answer = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True).stdout
    assert answer.startswith("HTTP/1.1 403")
    assert json.loads(answer.partition("\n\n")[2])["kind"] == "Denied"
    path.chmod(0o600)
    for folder, mode in parents.items():
        folder.chmod(mode)


def test_a_dump_owns_its_datasets_name(daemon, worker):
    """A second dump of a name is refused while the first is written; after a failure only the same may go on."""
    http, first = daemon.people(), new_request_id()
    put = "/v1/datasets/d1?pool=smol&request="
    assert http.put(put + first, dump_frame("d1"), RequestStatus).kind == "dump"
    with pytest.raises(Conflict, match="being written"):
        http.put(put + new_request_id(), dump_frame("d1"), RequestStatus)
    with pytest.raises(Conflict, match="being written"):
        http.call("DELETE", "/v1/datasets/d1")
    lease = worker.lease()
    assert lease.kind == "dump"
    (daemon.places.datasets / "d1.zarr").mkdir()
    opened = SlicesOpened(slices=2, written=(0,), progress=DumpProgress(documents=1))
    worker.post(f"/w1/slices?replica={worker.replica}&id={first}", opened)
    status = http.get("/v1/datasets/d1", DatasetStatus)
    assert (status.complete, status.request.progress.documents) == (False, 1)
    worker.outcome(Outcome(id=first, attempt=1, error=ErrorReport("HpcError", "disk full")))
    with pytest.raises(Conflict, match="other settings"):
        http.put(put + new_request_id(), dump_frame("d1", context=7), RequestStatus)
    again = new_request_id()
    assert http.put(put + again, dump_frame("d1"), RequestStatus).state == RequestState.QUEUED
    worker.finish(worker.lease())
    with pytest.raises(Conflict, match="exists"):
        http.put(put + new_request_id(), dump_frame("d1"), RequestStatus)
    http.call("DELETE", "/v1/datasets/d1")
    assert not list(daemon.places.datasets.iterdir())
    with pytest.raises(NotFound):
        http.get("/v1/datasets/d1", DatasetStatus)


@pytest.mark.parametrize(
    "frame",
    [pack(dump_frame("d2")[8:].partition(b"\n")[0]), dump_frame("d2") + b'{"id": 3}\n', dump_frame("other")],
    ids=["no corpus", "a line without text", "another name"],
)
def test_a_bad_dump_is_refused(daemon, worker, request_id, frame):
    """A corpus is read line by line before it is acknowledged."""
    with pytest.raises(InvalidInput):
        daemon.people().call("PUT", f"/v1/datasets/d2?pool=smol&request={request_id}", frame)


def test_a_complete_dataset_is_listed_with_the_checksums_of_its_files(daemon):
    """What the writer of datasets has made is complete, and each file comes whole and matches its CRC-32C."""
    path = daemon.places.datasets / "whole.zarr"
    tokens = TokenTable(np.arange(8), np.array([0, 3, 8]), ["a", "b"])
    captures = [CaptureSpec("c", (4,), "float32")]
    writer = DatasetWriter.create(path, captures=captures, tokens=tokens, provenance=Provenance(model="m"))
    with writer.slice(0) as part:
        part.write("c", 0, np.ones((8, 4), dtype=np.float32))
    writer.finish()
    http = daemon.people()
    (status,) = http.get("/v1/datasets", list[DatasetStatus])
    files = http.get("/v1/datasets/whole/files", list[DatasetFile])
    assert (status.name, status.path, status.complete) == ("whole", str(path), True)
    for file in files:
        data = http.call("GET", f"/v1/datasets/whole/files/{file.path}")
        assert (len(data), google_crc32c.value(data)) == (file.size, file.crc32c)
    http.call("DELETE", "/v1/datasets/whole")
    assert not path.exists()


def test_a_datasets_files_are_served_by_range_and_nothing_beside_them(daemon):
    """The bytes of a file come from any offset on; paths out of the dataset are refused."""
    folder = daemon.places.datasets / "real.zarr"
    (folder / "activations").mkdir(parents=True)
    (folder / "activations" / "c.0").write_bytes(bytes(range(256)))
    (folder / "evil").symlink_to(daemon.places.secret)
    http, got = daemon.people(), []
    http.download("/v1/datasets/real/files/activations/c.0", got.append, start=250)
    assert b"".join(got) == bytes(range(250, 256))
    for path in ("..%2f..%2fsecret", "evil", "%2fetc%2fpasswd"):
        with pytest.raises(InvalidInput):
            http.call("GET", f"/v1/datasets/real/files/{path}")
    http.call("DELETE", "/v1/datasets/real")


def test_the_daemon_loads_no_torch_and_is_small(daemon):
    """An import of it has no torch, its process maps no library of torch, and resident memory stays under 150 MB."""
    program = "import sys, nnsight_hpc.daemon.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
    assert "libtorch" not in Path(f"/proc/{daemon.process.pid}/maps").read_text()
    assert psutil.Process(daemon.process.pid).memory_info().rss < 150e6


def test_without_a_pool_that_has_the_weights_the_error_shows_both_fingerprints(daemon_with):
    """A request that names no pool: the fingerprint of its graph, and those that the pools hold."""
    daemon = daemon_with()
    daemon.up()
    daemon.worker().report(ReplicaState.READY, model=ModelIdentity(id="org/model", fingerprint="ffff0001"))
    with pytest.raises(NotFound, match="ffff0002") as caught:
        daemon.people().put(f"/v1/requests/{new_request_id()}", run_frame("ffff0002"), RequestStatus)
    assert caught.value.why == "the pools are smol\nsmol holds org/model, fingerprint ffff0001"


def test_a_file_that_cannot_be_written_is_named(daemon_with):
    """A request whose bytes cannot be stored is refused with the file and the system's reason."""
    daemon = daemon_with()
    daemon.up()
    daemon.places.requests.rmdir()
    with pytest.raises(HpcError, match="cannot read or write a file") as caught:
        send(daemon.people(), new_request_id(), frame=run_frame(tokens=10_000))
    assert str(daemon.places.requests) in caught.value.where
    assert caught.value.why == "No such file or directory"
