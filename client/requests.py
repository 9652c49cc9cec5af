"""A request as an object: watched, waited for, cancelled and read, from the process that sent it or from any other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nnsight_hpc.client.kept import kept_connection
from nnsight_hpc.client.patience import WHILE_WAITING
from nnsight_hpc.client.results import fetch_result
from nnsight_hpc.client.waiting import check_completed, messages, until_ended
from nnsight_hpc.execution.values import unpack_values
from nnsight_hpc.wire.messages import RequestStatus, decode
from nnsight_hpc.wire.names import check_request_id

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nnsight_hpc.wire.messages import LogLine


class RemoteRequest:
    """A request on a cluster. It holds no connection, so it may be kept for days.

    All of them raise the `HpcError` that stands in the way of reaching the daemon.

    Parameters
    ----------
    id
        The request's, as ``nnsight-hpc queue`` lists it.
    cluster
        The profile to use; by default the configured one.
    """

    def __init__(self, id: str, cluster: str | None = None) -> None:
        self.id, self.cluster = check_request_id(id), cluster

    def __repr__(self) -> str:
        return f"<request {self.id}{f' on {self.cluster}' if self.cluster else ''}>"

    def status(self) -> RequestStatus:
        """Where it is: its state, its place in the queue, its times."""
        with kept_connection(self.cluster) as daemon:
            return daemon.get(f"/v1/requests/{self.id}", RequestStatus)

    def wait(self, timeout: float | None = None) -> RequestStatus:
        """The status once the request has ended, however it ended, or as it is after `timeout` seconds."""
        with kept_connection(self.cluster, patience=WHILE_WAITING) as daemon:
            return until_ended(daemon, self.id, timeout)

    def result(self, timeout: float | None = None) -> dict[str, Any]:
        """The saved values by name, on the CPU and detached, once the request has completed; as often as asked for.

        A value that was never made is an `execution.values.Absent`.

        Raises
        ------
        HpcError
            What the request failed with: an `ExecutionFailed` is also an instance of the exception's own type.
        RequestCancelled
            Somebody cancelled it.
        Conflict
            It has not ended within `timeout` seconds.
        """
        with kept_connection(self.cluster, patience=WHILE_WAITING) as daemon:
            check_completed(until_ended(daemon, self.id, timeout))
            return unpack_values(fetch_result(daemon, self.id))

    def cancel(self) -> RequestStatus:
        """Cancel it: at once while it is queued, at its next module while it runs; one that has ended stays as it is."""
        with kept_connection(self.cluster) as daemon:
            return decode(daemon.call("DELETE", f"/v1/requests/{self.id}"), RequestStatus)

    def logs(self, *, follow: bool = False) -> Iterator[LogLine]:
        """What it has said so far (`tracer.log`, `print`); with `follow` also what comes, as it comes, until it ends."""
        with kept_connection(self.cluster, patience=WHILE_WAITING if follow else 0.0) as daemon:
            for log in messages(daemon, self.id, wait=follow):
                yield from log.lines


def find(id: str, cluster: str | None = None) -> RemoteRequest:
    """The request of that id, which any process may have sent; raises `NotFound` when the cluster has none."""
    request = RemoteRequest(id, cluster)
    request.status()
    return request
