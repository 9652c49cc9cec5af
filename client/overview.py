"""What `status` shows: the daemon, its pools, their replicas, and the requests."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from nnsight_hpc.client.tables import Table, duration, since
from nnsight_hpc.client.words import alive, detail_words, first_line, place_words, serving, state_words
from nnsight_hpc.wire.messages import LISTED
from nnsight_hpc.wire.states import RequestState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nnsight_hpc.wire.messages import Hello, RequestStatus
    from nnsight_hpc.wire.pools import PoolStatus, ReplicaStatus, Status


def overview(status: Status) -> list[str | Table]:
    """The daemon, a table of the pools and what they wait for, one of the replicas, and one of the requests."""
    replicas = [_replica_row(pool, replica) for pool in status.pools for replica in _shown(pool)]
    return [
        daemon_words(status.hello),
        Table(
            ["pool", "model", "serving", "queued", "gpu hours"],
            [_pool_row(pool) for pool in status.pools],
            empty="No pools: nnsight-hpc up NAME --model …",
        ),
        "\n".join(f"{pool.spec.name}: {note}" for pool in status.pools if (note := _note(pool))),
        Table(["replica", "state", "job", "host", "time left", "detail"], replicas),
        *requests_blocks(status.requests),
    ]


def daemon_words(hello: Hello) -> str:
    return (
        f"Daemon of {hello.owner} on {hello.host}, process {hello.pid}, version {hello.version}, "
        f"{hello.executor} executor, home {hello.home}"
    )


def requests_blocks(
    requests: Sequence[RequestStatus], *, limit: int = LISTED, empty: str = ""
) -> tuple[str | Table, ...]:
    """A table of requests, and whether more wait than the `limit` that was asked for."""
    waiting = sum(one.state == RequestState.QUEUED for one in requests)
    more = f"Perhaps more wait than these {waiting}: nnsight-hpc queue --limit N" if waiting >= limit else ""
    return _requests_table(requests, empty), more


def _requests_table(requests: Sequence[RequestStatus], empty: str) -> Table:
    rows = [
        [
            one.id,
            one.kind,
            one.pool,
            one.state.lower(),
            one.user,
            since(max(one.times.values(), default=0.0)),
            _request_detail(one),
        ]
        for one in requests
    ]
    return Table(["request", "kind", "pool", "state", "user", "since", "detail"], rows, empty)


def _pool_row(pool: PoolStatus) -> list[str]:
    spec = pool.spec
    allowed = f" of {spec.replicas}" if spec.least < spec.most else ""
    hours = f"{pool.gpu_seconds / 3600:.2f}"
    return [spec.name, spec.model, f"{serving(pool)}/{pool.desired}{allowed}", str(pool.queued), hours]


def _note(pool: PoolStatus) -> str:
    if pool.held is not None:
        return f"held: {pool.held.what}"
    return "is taken down" if pool.down else first_line(pool.note)


def _shown(pool: PoolStatus) -> list[ReplicaStatus]:
    """Those that have not ended; while none serves, also the last that has, if it failed or none is on its way."""
    last, present = [one for one in pool.replicas if one.state.ended][-1:], alive(pool)
    has_failed = any(one.cause and not one.cause.expected for one in last)
    return [*(last if not serving(pool) and (has_failed or not present) else []), *present]


def _replica_row(pool: PoolStatus, replica: ReplicaStatus) -> list[str]:
    left = duration(replica.ends - time.time()) if replica.ends and not replica.state.ended else ""
    return [replica.id, state_words(replica), replica.job_id, replica.host, left, _replica_detail(pool, replica)]


def _replica_detail(pool: PoolStatus, replica: ReplicaStatus) -> str:
    successors = ", ".join(one.id for one in alive(pool) if one.succeeds == replica.id)
    return "; ".join(filter(None, [detail_words(replica), successors and f"then {successors}"]))


def _request_detail(request: RequestStatus) -> str:
    if request.error is not None:
        return request.error.what
    return "; ".join(filter(None, [", ".join(place_words(request)), request.waits_for, request.note]))
