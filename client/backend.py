"""The remote backend of tracing: sends a graph to a daemon, and, where asked to, waits and brings the values back."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nnsight_hpc.client import config
from nnsight_hpc.client.dumps import send_dump
from nnsight_hpc.client.kept import kept_connection
from nnsight_hpc.client.patience import WHILE_WAITING
from nnsight_hpc.client.progress import Progress
from nnsight_hpc.client.remote_dump import RemoteDump
from nnsight_hpc.client.requests import RemoteRequest
from nnsight_hpc.client.results import fetch_result
from nnsight_hpc.client.sending import request_id, request_path
from nnsight_hpc.client.waiting import FIRST_POLL, check_completed, messages, show_wait
from nnsight_hpc.execution.values import save_tensors, unpack_values
from nnsight_hpc.wire.errors import HpcError, Unreachable
from nnsight_hpc.wire.frames import pack, unpack
from nnsight_hpc.wire.messages import ModelIdentity, RequestLog, decode

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch

    from nnsight_hpc.client.patience import PatientClient
    from nnsight_hpc.graph import Graph
    from nnsight_hpc.tracing.models import NNsight
    from nnsight_hpc.wire.http import HttpClient
    from nnsight_hpc.wire.messages import DumpSpec, RequestStatus


class RemoteBackend:
    """Runs graphs on a pool.

    Parameters
    ----------
    pool
        Its name; by default the pool whose model has the same weights.
    cluster
        The profile to use; by default the one that the pool's definition names, else the configured one.
    idempotency_key
        What is sent again under the same key is the request that is there already; `run` then brings its values.
    sending
        ``needs``, ``exclusive``, ``priority``: see `client.sending.request_path`.
    """

    remote = True

    def __init__(
        self, pool: str | None = None, cluster: str | None = None, *, idempotency_key: str | None = None, **sending: Any
    ) -> None:
        self._pool, self._cluster = pool, cluster or config.load().bound(pool)
        self._key, self._sending = idempotency_key, sending

    def submit(self, graph: Graph, tensors: Mapping[str, torch.Tensor], model: NNsight) -> RemoteRequest:  # noqa: ARG002
        """Send `graph` and return as soon as the daemon has stored it. Raises what the daemon says against it."""
        with self._sent("PUT", graph, tensors) as (_, request, _):
            return RemoteRequest(request, config.load().chosen(self._cluster))

    def run(self, graph: Graph, tensors: Mapping[str, torch.Tensor], model: NNsight, **local: Any) -> dict[str, Any]:  # noqa: ARG002
        """Run `graph` and return what it saves, on the CPU and detached. What it says is printed as it comes.

        Ctrl-C cancels the request. `local` is of use in this process only: the daemon refuses graphs that need it.

        Raises
        ------
        HpcError
            What the daemon or the worker said: an `ExecutionFailed` is also an instance of the exception's own type.
        """
        with self._sent("POST", graph, tensors, wait=FIRST_POLL) as (daemon, request, answer):
            log, result = unpack(answer)
            check_completed(_watch(daemon, request, decode(log, RequestLog)))
            return unpack_values(result or fetch_result(daemon, request))

    def dump(self, spec: DumpSpec, block: bytes, model: NNsight) -> RemoteDump:  # noqa: ARG002
        """Have a dataset written on the pool, and return as soon as the daemon has stored what is to be done."""
        with kept_connection(self._cluster, patience=WHILE_WAITING) as daemon:
            sent = send_dump(daemon, spec, block, self._pool, idempotency_key=self._key, **self._sending)
        return RemoteDump(sent.id, spec.name, config.load().chosen(self._cluster))

    @contextmanager
    def _sent(
        self, method: str, graph: Graph, tensors: Mapping[str, torch.Tensor], wait: float | None = None
    ) -> Iterator[tuple[PatientClient, str, bytes]]:
        """Send `graph`: the connection, on which Ctrl-C cancels the request, the request's id, and what is answered."""
        block = save_tensors(tensors)
        digest = _digest(graph, block) if self._key is not None else ""
        with kept_connection(self._cluster, patience=WHILE_WAITING) as daemon:
            request = request_id(daemon, self._key)
            path = request_path(request, self._pool, **self._sending, digest=digest, wait=wait)
            with _cancelled_on_interrupt(daemon, request), _found_again(daemon, request):
                yield daemon, request, daemon.call(method, path, pack(graph.to_json().encode(), block), timeout=300)


def _digest(graph: Graph, tensors: bytes) -> str:
    """Of what a graph computes with which weights; where it was written and where its model lies may be other each time."""
    model = ModelIdentity(id=graph.model.fingerprint or graph.model.id)
    return hashlib.sha256(replace(graph.without_lines(), model=model).to_json().encode() + b"\0" + tensors).hexdigest()


def _watch(daemon: HttpClient, request: str, known: RequestLog) -> RequestStatus:
    """Print what the request says until it has ended; a long wait is shown: what it waits for, how far that is."""
    with Progress(f"request {request}", after=FIRST_POLL) as progress:
        for log in messages(daemon, request, known=known):
            for line in log.lines:
                print(line.text, flush=True)
            if not log.status.state.ended:
                show_wait(progress, log.status)
    return log.status


@contextmanager
def _found_again(daemon: PatientClient, request: str) -> Iterator[None]:
    """Who has waited in vain for a daemon that went out of reach learns how to come back."""
    try:
        yield
    except Unreachable as error:
        if daemon.reached:
            again = f"nnsight_hpc.client.requests.find({request!r}).result() waits for it again"
            error.next = f"the request goes on where it has arrived: {again}"
        raise


@contextmanager
def _cancelled_on_interrupt(daemon: PatientClient, request: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        daemon.close()  # an answer may be half read
        daemon.patience = 0.0  # nobody waits for a daemon that cannot be reached
        with suppress(HpcError):  # it may not have arrived there yet
            daemon.call("DELETE", f"/v1/requests/{request}", timeout=10)
        raise
