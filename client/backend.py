"""The remote backend of tracing: sends a graph to a daemon, and, where asked to, waits and brings the values back."""

from __future__ import annotations

import sys
import time
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from nnsight_hpc.client import config
from nnsight_hpc.client.requests import RemoteRequest
from nnsight_hpc.client.session import connect
from nnsight_hpc.client.waiting import FIRST_POLL, check_completed, messages
from nnsight_hpc.execution.values import save_tensors, unpack_values
from nnsight_hpc.wire.errors import HpcError
from nnsight_hpc.wire.frames import pack
from nnsight_hpc.wire.messages import RequestStatus
from nnsight_hpc.wire.names import new_request_id

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch

    from nnsight_hpc.graph import Graph
    from nnsight_hpc.tracing.models import NNsight
    from nnsight_hpc.wire.http import HttpClient


class RemoteBackend:
    """Runs graphs on a pool.

    Parameters
    ----------
    pool
        Its name; by default the pool whose model has the same weights.
    cluster
        The profile to use; by default the configured one.
    """

    remote = True

    def __init__(self, pool: str | None = None, cluster: str | None = None) -> None:
        self._pool, self._cluster = pool, cluster

    def submit(self, graph: Graph, tensors: Mapping[str, torch.Tensor], model: NNsight) -> RemoteRequest:  # noqa: ARG002
        """Send `graph` and return as soon as the daemon has stored it. Raises what the daemon says against it."""
        request = new_request_id()
        with closing(connect(self._cluster)) as daemon, _cancelled_on_interrupt(daemon, request):
            self._send(daemon, request, graph, tensors)
        return RemoteRequest(request, config.load().chosen(self._cluster))

    def run(self, graph: Graph, tensors: Mapping[str, torch.Tensor], model: NNsight, **local: Any) -> dict[str, Any]:  # noqa: ARG002
        """Run `graph` and return what it saves, on the CPU and detached. What it says is printed as it comes.

        Ctrl-C cancels the request. `local` is of use in this process only: the daemon refuses graphs that need it.

        Raises
        ------
        HpcError
            What the daemon or the worker said: an `ExecutionFailed` is also an instance of the exception's own type.
        """
        request = new_request_id()
        with closing(connect(self._cluster)) as daemon, _cancelled_on_interrupt(daemon, request):
            self._send(daemon, request, graph, tensors)
            check_completed(_watch(daemon, request))
            return unpack_values(daemon.call("GET", f"/v1/requests/{request}/result", timeout=300))

    def _send(self, daemon: HttpClient, request: str, graph: Graph, tensors: Mapping[str, torch.Tensor]) -> None:
        query = f"?{urlencode({'pool': self._pool})}" if self._pool else ""
        frame = pack(graph.to_json().encode(), save_tensors(tensors))
        daemon.put(f"/v1/requests/{request}{query}", frame, RequestStatus, timeout=300)


def _watch(daemon: HttpClient, request: str) -> RequestStatus:
    """Print what the request says until it has ended; say where it is when that takes long and somebody looks on."""
    began = time.monotonic()
    for log in messages(daemon, request):
        for line in log.lines:
            print(line.text, flush=True)
        status = log.status
        if not status.state.ended and time.monotonic() - began > FIRST_POLL and sys.stderr.isatty():
            print(f"request {status.id} is {status.state}{_place(status)}", file=sys.stderr)
    return status


def _place(status: RequestStatus) -> str:
    note = f": {status.note}" if status.note else ""
    return f", place {status.position} in the queue{note}" if status.position is not None else note


@contextmanager
def _cancelled_on_interrupt(daemon: HttpClient, request: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        daemon.close()  # an answer may be half read
        with suppress(HpcError):  # it may not have arrived there yet
            daemon.call("DELETE", f"/v1/requests/{request}", timeout=10)
        raise
