"""Waiting for a request and for a pool, by long polls, while saying what is waited for."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from nnsight_hpc.client.app import note
from nnsight_hpc.client.progress import Progress, is_watched
from nnsight_hpc.client.words import alive, dump_words, newest, replica_words, request_words, serving
from nnsight_hpc.wire.errors import Conflict, NotFound, ReplicaFailed, RequestCancelled, from_report
from nnsight_hpc.wire.messages import RequestLog, RequestStatus
from nnsight_hpc.wire.pools import PoolStatus, ReplicaStatus, Status
from nnsight_hpc.wire.states import ReplicaState, RequestState

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nnsight_hpc.wire.http import HttpClient

POLL = 2.0
"""Seconds of one long poll while a person looks on: progress is shown as often, a change of state at once."""
FIRST_POLL, LONG_POLL = 3.0, 25.0
"""Seconds of one long poll right after a change, and of all others, while a program waits unseen."""


def wait_for_request(client: HttpClient, request: str, *, program: str) -> RequestStatus:
    """The status of a request once it has ended, however it ended; Ctrl-C leaves it running and says so.

    `program` is how a command begins that goes on with it.
    """
    status = client.get(f"/v1/requests/{request}", RequestStatus)
    try:
        with Progress(f"{status.kind} {request}") as progress:
            while not status.state.ended:
                show_request(progress, status)
                path = f"/v1/requests/{request}?wait={POLL}&seen={status.state}"
                status = client.get(path, RequestStatus, timeout=POLL + 30)
    except KeyboardInterrupt:
        note(f"The request goes on. {program} wait {request}, or {program} cancel {request}")
        raise
    return status


def until_ended(client: HttpClient, request: str, timeout: float | None = None) -> RequestStatus:
    """The status of a request once it has ended, or as it is after `timeout` seconds; a long wait is shown to a person."""
    until = float("inf") if timeout is None else time.monotonic() + timeout
    status, seconds = client.get(f"/v1/requests/{request}", RequestStatus), patience()
    with Progress(f"{status.kind} {request}", after=FIRST_POLL) as progress:
        while not status.state.ended and (left := until - time.monotonic()) > 0:
            show_wait(progress, status)
            path = f"/v1/requests/{request}?wait={min(left, seconds):.3f}&seen={status.state}"
            status = client.get(path, RequestStatus, timeout=seconds + 30)
    return status


def patience() -> float:
    """Seconds of a program's long poll: few where a person looks on, whom progress is shown."""
    return POLL if is_watched() else LONG_POLL


def messages(
    client: HttpClient, request: str, *, wait: bool = True, known: RequestLog | None = None
) -> Iterator[RequestLog]:
    """What a request says and how it stands, at each change and every so often, until it has ended; or only so far.

    `known`, if given, is the first of it.
    """
    position, seen, seconds, longest = 0, "", FIRST_POLL, patience()
    if known is not None:
        yield known
        if known.complete:
            return
        position, seen = known.next, known.status.state
    while True:
        path = f"/v1/requests/{request}/log?from={position}&wait={seconds if wait else 0:g}&seen={seen}"
        log = client.get(path, RequestLog, timeout=seconds + 30)
        yield log
        if log.complete or not (wait or log.lines):
            return
        seconds = min(FIRST_POLL, longest) if log.status.state != seen else longest
        position, seen = log.next, log.status.state


def check_completed(status: RequestStatus) -> RequestStatus:
    """`status`, or the error of a request that did not complete."""
    if status.state is RequestState.COMPLETED:
        return status
    if status.error is not None:
        raise from_report(status.error)
    if status.state is RequestState.CANCELLED:
        raise RequestCancelled(f"the request {status.id} was cancelled")
    raise Conflict(f"the request {status.id} has no result", why=f"it is {status.state}")


def show_wait(progress: Progress, status: RequestStatus) -> None:
    """As `show_request` to a person; a log learns only what a request in the queue waits for."""
    if is_watched() or status.state is RequestState.QUEUED:
        show_request(progress, status)


def show_request(progress: Progress, status: RequestStatus) -> None:
    """Say how far a request is, or what it waits for."""
    if status.progress is not None and status.progress.tokens_total:
        dump = status.progress
        progress.show(dump_words(dump), done=dump.tokens, total=dump.tokens_total)
    else:
        progress.show(request_words(status))


def wait_until_ready(client: HttpClient, pool: PoolStatus, *, known: frozenset[str]) -> PoolStatus:
    """The pool once as many replicas serve as it is to have at least; one, where it may have none later.

    Raises `ReplicaFailed`, with the end of its log, for one that ended before that, unless nobody is to blame (it was
    preempted, and another one is on its way); `known` are ids of replicas whose end is none of that: they had ended, or
    make way for what was asked for.
    """
    name = pool.spec.name
    with Progress(f"pool {name}") as progress:
        while serving(pool) < max(pool.spec.least, 1):
            if failed := [one for one in pool.replicas if one.id not in known and _has_failed(one)]:
                raise _failure(failed[-1])
            if pool.held is not None:
                raise from_report(pool.held)
            _show_pool(progress, pool)
            pool = _look_again(client, pool)
    return pool


def wait_until_empty(client: HttpClient, pool: PoolStatus) -> PoolStatus:
    """The pool's last status once no replica of it is left."""
    name = pool.spec.name
    with Progress(f"pool {name}") as progress:
        while left := alive(pool):
            progress.show(f"waits for {len(left)} worker{'s' * (len(left) > 1)}: {replica_words(left[-1])}")
            try:
                pool = _look_again(client, pool)
            except NotFound:
                break
    return pool


def wait_until_all_empty(client: HttpClient) -> list[ReplicaStatus]:
    """Nothing: the workers of all pools, once none is left."""
    with Progress("pools") as progress:
        while left := workers(client):
            progress.show(f"wait for {len(left)} worker{'s' * (len(left) > 1)}: {replica_words(left[-1])}")
            time.sleep(POLL / 2)
    return left


def workers(client: HttpClient) -> list[ReplicaStatus]:
    """The replicas of all pools that have not ended."""
    return [replica for pool in client.get("/v1/status", Status).pools for replica in alive(pool)]


def _look_again(client: HttpClient, pool: PoolStatus) -> PoolStatus:
    """The pool after a change, or after a while; not more than ten times a second, whatever changes."""
    time.sleep(0.1)
    replica = newest(pool)
    path = f"/v1/pools/{pool.spec.name}?wait={POLL}&seen={'' if replica is None else replica.state}"
    return client.get(path, PoolStatus, timeout=POLL + 30)


def _show_pool(progress: Progress, pool: PoolStatus) -> None:
    replica = newest(pool)
    if replica is None:
        progress.show(pool.note or "waits to be submitted")
    elif replica.state is ReplicaState.LOADING:
        progress.show(replica_words(replica), done=replica.loaded, total=replica.total)
    else:
        progress.show(replica_words(replica))


def _has_failed(replica: ReplicaStatus) -> bool:
    return replica.state.ended and not (replica.cause and replica.cause.blameless)


def _failure(replica: ReplicaStatus) -> ReplicaFailed:
    where = [f"replica {replica.id}", replica.job_id and f"job {replica.job_id}", replica.log]
    cause = f" ({replica.cause.words})" if replica.cause else ""
    tail = f"the last lines of its log:\n{replica.tail}" if replica.tail else ""
    return ReplicaFailed(
        f"the worker of pool {replica.pool} ended before it could serve{cause}",
        where=" ".join(filter(None, where)),
        why="\n".join(filter(None, [replica.reason, tail])),
        next=f"put right what it says, then `nnsight-hpc up {replica.pool} …` again; "
        f"`nnsight-hpc down {replica.pool}` ends the pool",
    )
