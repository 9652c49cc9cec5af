"""The remote backend of tracing: sends a graph to a daemon, waits, and brings the saved values back."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from nnsight_hpc.client.session import connect
from nnsight_hpc.client.waiting import check_completed
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

_POLL_SECONDS = 25.0
_SAY_AFTER_SECONDS = 3.0


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

    def run(self, graph: Graph, tensors: Mapping[str, torch.Tensor], model: NNsight) -> dict[str, Any]:  # noqa: ARG002
        """Run `graph` and return what it saves, on the CPU and detached. Ctrl-C cancels the request.

        Raises
        ------
        HpcError
            What the daemon or the worker said: an `ExecutionFailed` is also an instance of the exception's own type.
        """
        frame = pack(graph.to_json().encode(), save_tensors(tensors))
        request = new_request_id()
        query = f"?{urlencode({'pool': self._pool})}" if self._pool else ""
        daemon = connect(self._cluster)
        try:
            with _cancelled_on_interrupt(daemon, request):
                status = daemon.put(f"/v1/requests/{request}{query}", frame, RequestStatus, timeout=300)
                check_completed(_wait(daemon, status))
                return unpack_values(daemon.call("GET", f"/v1/requests/{request}/result", timeout=300))
        finally:
            daemon.close()


def _wait(daemon: HttpClient, status: RequestStatus) -> RequestStatus:
    """Wait until the request has ended; say where it is when that takes long and somebody looks on."""
    began = time.monotonic()
    while not status.state.ended:
        seconds = _POLL_SECONDS if time.monotonic() - began > _SAY_AFTER_SECONDS else _SAY_AFTER_SECONDS
        path = f"/v1/requests/{status.id}?wait={seconds:.0f}&seen={status.state}"
        status = daemon.get(path, RequestStatus, timeout=seconds + 30)
        if not status.state.ended and time.monotonic() - began > _SAY_AFTER_SECONDS and sys.stderr.isatty():
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
