"""The workers' side, over real TLS: who is let in, and what a worker may say."""

from __future__ import annotations

import socket
import ssl
import threading
import time

import pytest

from nnsight_hpc.slurm.worker.link import dial
from nnsight_hpc.wire.errors import Conflict, Denied, HpcError, Incompatible, NotFound, Unreachable
from nnsight_hpc.wire.files import write_atomically
from nnsight_hpc.wire.messages import ModelIdentity, RequestStatus, encode
from nnsight_hpc.wire.names import new_request_id
from nnsight_hpc.wire.pools import PoolSpec, PoolStatus
from nnsight_hpc.wire.states import EndCause, ReplicaState, RequestState
from nnsight_hpc.wire.workers import EndRecord, Orders, Outcome, WorkerHello, WorkerWelcome
from tests.daemon.process import LONG, Worker, run_frame, send, wait_for


def test_a_wrong_secret_is_refused_and_logged(daemon, worker):
    """401, `Denied`, and a line in the log that names the call and the caller."""
    with pytest.raises(Denied, match="secret"):
        daemon.tls(secret="guessed").call("POST", f"/w1/lease?replica={worker.replica}")
    assert "refused POST /w1/lease from 127.0.0.1: wrong secret" in daemon.log()


def test_secret_and_key_are_the_owners_alone(daemon):
    """Neither can be read by others, and the secret is not in the lease, which may be."""
    modes = [path.stat().st_mode & 0o777 for path in (daemon.places.secret, daemon.places.key, daemon.places.home)]
    assert modes == [0o600, 0o600, 0o700]
    assert daemon.places.secret.read_bytes() not in daemon.places.lease.read_bytes()


@pytest.mark.parametrize("epoch", [0, 99])
def test_another_epoch_is_misdirected(daemon, worker, epoch):
    """A worker that means another daemon is told to look for it again, and nothing is done for it."""
    with pytest.raises(Unreachable, match="this daemon has epoch 1"):
        daemon.tls(epoch=epoch).call("POST", f"/w1/lease?replica={worker.replica}")


def test_the_certificate_is_pinned(daemon):
    """The lease's certificate satisfies a strict client and the worker's own dialling; without it TLS is refused."""
    dial(daemon.lease()).close()
    with socket.create_connection((daemon.lease().address, daemon.lease().port)) as plain, pytest.raises(ssl.SSLError):
        ssl.create_default_context().wrap_socket(plain, server_hostname="nnsight-hpc-daemon")


def test_people_and_workers_have_different_doors(daemon):
    """The people's interface is not on the workers' port."""
    with pytest.raises(NotFound):
        daemon.tls().call("GET", "/v1/status")


def test_an_unknown_replica_is_not_found(daemon, worker):
    """Without a job.json of that name nobody can register, and a name that is a path is refused."""
    stranger = Worker(daemon, "smol-unknown")
    with pytest.raises(NotFound):
        stranger.register()
    with pytest.raises(HpcError, match="cannot be the name"):
        Worker(daemon, "../smol").register()


def test_another_protocol_is_incompatible(daemon, worker):
    """Both versions are named."""
    hello = WorkerHello(replica=worker.replica, job_id="", host="n1", pid=1, ranks=1, protocol=99)
    with pytest.raises(Incompatible, match="99"):
        worker.post("/w1/register", hello, WorkerWelcome)


def test_a_replica_that_was_submitted_by_hand_is_adopted(daemon_with):
    """A job.json in its folder is enough: the replica joins its pool, which is made where it is not known."""
    daemon = daemon_with(poll=(1000.0, 1000.0), asked=1000.0)  # at a look it would be missed: it has no job
    folder = daemon.places.replica("by-hand-1")
    folder.mkdir()
    write_atomically(folder / "job.json", encode(PoolSpec(name="by-hand", model="m")))
    worker = Worker(daemon, "by-hand-1")
    assert worker.register().pool == PoolSpec(name="by-hand", model="m")
    replica = daemon.people().get("/v1/pools/by-hand", PoolStatus).replicas[0]
    assert (replica.id, replica.state, replica.host) == ("by-hand-1", ReplicaState.LOADING, "n1")
    daemon.people().call("DELETE", "/v1/pools/by-hand")
    assert worker.lease(wait=30) is None
    assert worker.report(ReplicaState.LOADING).drain
    worker.post("/w1/end", EndRecord(replica="by-hand-1", cause=EndCause.DRAINED))


def test_loading_is_shown_in_bytes_and_wakes_who_waits(daemon):
    """Each report of bytes answers a long poll of the pool; states in between that nobody reported are passed through."""
    daemon.up("other")
    worker = Worker(daemon, daemon.newest("other").id)
    worker.register()
    worker.report(ReplicaState.LOADING, loaded=10, total=100)
    shown = daemon.people().get("/v1/pools/other?wait=5&seen=STARTING", PoolStatus).replicas[0]
    assert (shown.state, shown.loaded, shown.total) == (ReplicaState.LOADING, 10, 100)
    worker.report(ReplicaState.BUSY)
    assert daemon.people().get("/v1/pools/other?wait=5&seen=LOADING", PoolStatus).replicas[0].state == "BUSY"
    with pytest.raises(Conflict, match="cannot become LOADING"):
        worker.report(ReplicaState.LOADING)


def test_requests_for_other_weights_fail_once_the_weights_are_known(daemon):
    """What was queued by the model's name while it loaded fails with both fingerprints; the rest stays."""
    daemon.up("late")
    http, right, wrong = daemon.people(), new_request_id(), new_request_id()
    send(http, right, "late", run_frame("aaa"))
    send(http, wrong, "late", run_frame("bbb"))
    worker = daemon.worker("late")
    worker.report(ReplicaState.READY, model=ModelIdentity(id="org/model", fingerprint="aaa"))
    assert http.get(f"/v1/requests/{wrong}", RequestStatus).error.kind == "Conflict"
    assert http.get(f"/v1/requests/{right}", RequestStatus).state == RequestState.QUEUED
    assert http.get("/v1/pools/late", PoolStatus).model.fingerprint == "aaa"


def test_a_lease_is_not_given_to_a_closed_connection(daemon, worker, request_id):
    """A worker that hung up while it waited loses nothing: the next to ask gets the request."""
    waiting = daemon.tls()
    stream = waiting._open_stream()
    head = f"POST /w1/lease?replica={worker.replica}&wait=30 HTTP/1.1\r\nHost: d\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in waiting._headers.items())
    stream.sendall(head.encode() + b"\r\n")
    stream.close()
    wait_for(lambda: worker.lease(wait=0) is None)
    send(daemon.people(), request_id)
    lease = worker.lease()
    assert (lease.id, lease.attempt) == (request_id, 1)
    worker.finish(lease)


def test_orders_are_given_at_once(daemon, worker):
    """A worker that waits for orders hears of a cancelled request as it is cancelled, and of nothing else."""
    assert Orders() == worker.post(f"/w1/orders?replica={worker.replica}&wait=0.2", None, Orders)
    request = new_request_id()
    send(daemon.people(), request)
    lease = worker.lease()
    worker.started(lease)
    waiting = Worker(daemon, worker.replica)
    heard: list[Orders] = []
    thread = threading.Thread(
        target=lambda: heard.append(waiting.post(f"/w1/orders?replica={worker.replica}&wait={LONG}", None, Orders))
    )
    thread.start()
    time.sleep(0.3)
    begun = time.monotonic()
    daemon.people().call("DELETE", f"/v1/requests/{request}")
    thread.join(120)
    assert time.monotonic() - begun < LONG / 2
    assert [Orders(cancel=(request,))] == heard
    worker.outcome(Outcome(id=request, attempt=lease.attempt, cancelled=True))
    assert Orders() == worker.post(f"/w1/orders?replica={worker.replica}&wait=0.2", None, Orders)
