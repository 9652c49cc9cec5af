"""``nnsight-hpc status``."""

from __future__ import annotations

import time

from nnsight_hpc.client.app import App, command, pass_app
from nnsight_hpc.client.tables import duration, print_table, since
from nnsight_hpc.client.waiting import newest, replica_words
from nnsight_hpc.wire.messages import Hello, PoolStatus, ReplicaStatus, RequestStatus, Status


@command()
@pass_app
def status(app: App) -> None:
    """Show the daemon, its pools and its requests."""
    found = app.client(start=False).get("/v1/status", Status)
    app.answer(found, lambda: _print(found))


def _print(status: Status) -> None:
    print(daemon_words(status.hello))
    print()
    rows = [row for pool in status.pools for row in _pool_rows(pool)]
    print_table(
        ["pool", "model", "serving", "queued", "replica", "time left"],
        rows,
        empty="No pools: nnsight-hpc up NAME --model …",
    )
    if status.requests:
        print()
        print_requests(status.requests)


def daemon_words(hello: Hello) -> str:
    return (
        f"Daemon of {hello.owner} on {hello.host}, process {hello.pid}, version {hello.version}, "
        f"{hello.executor} executor, home {hello.home}"
    )


def print_requests(requests: tuple[RequestStatus, ...] | list[RequestStatus]) -> None:
    rows = [
        [
            one.id,
            one.kind,
            one.pool,
            one.state.lower(),
            one.user,
            since(max(one.times.values(), default=0.0)),
            _detail(one),
        ]
        for one in requests
    ]
    print_table(["request", "kind", "pool", "state", "user", "since", "detail"], rows, empty="No requests.")


def _pool_rows(pool: PoolStatus) -> list[list[str]]:
    """A line for each replica that has not ended; else one with the newest's end."""
    alive = [replica for replica in pool.replicas if not replica.state.ended]
    shown: list[ReplicaStatus | None] = [*alive] or [newest(pool)]
    serving = sum(replica.state in ("READY", "BUSY") for replica in pool.replicas)
    head = [pool.spec.name, pool.spec.model, f"{serving}/{pool.desired}", str(pool.queued)]
    rows: list[list[str]] = []
    for replica in shown:
        words = replica_words(replica) if replica else "none yet"
        left = duration(replica.ends - time.time()) if replica and replica.ends else ""
        rows.append([*(head if not rows else [""] * len(head)), words, left])
    if pool.held is not None:
        rows.append([*[""] * len(head), f"held: {pool.held.what}", ""])
    return rows


def _detail(request: RequestStatus) -> str:
    if request.error is not None:
        return request.error.what
    return request.note or (f"{request.position} before it" if request.position else "")
