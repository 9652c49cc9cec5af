"""Waiting for a request and for a pool, by long polls, while saying what is waited for."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from nnsight_hpc.client.app import note
from nnsight_hpc.client.progress import Progress
from nnsight_hpc.client.tables import duration, size
from nnsight_hpc.wire.errors import Conflict, HpcError, NotFound, ReplicaFailed, RequestCancelled, from_report
from nnsight_hpc.wire.messages import PoolStatus, ReplicaStatus, RequestLog, RequestStatus
from nnsight_hpc.wire.states import ReplicaState, RequestState

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nnsight_hpc.wire.http import HttpClient
    from nnsight_hpc.wire.messages import DumpProgress

POLL = 2.0
"""Seconds of one long poll while a person looks on: progress is shown as often, a change of state at once."""
FIRST_POLL, LONG_POLL = 3.0, 25.0
"""Seconds of one long poll right after a change, and of all others, while a program waits."""
_SERVING = (ReplicaState.READY, ReplicaState.BUSY)


def wait_for_request(client: HttpClient, request: str) -> RequestStatus:
    """The status of a request once it has ended, however it ended; Ctrl-C leaves it running and says so."""
    status = client.get(f"/v1/requests/{request}", RequestStatus)
    try:
        with Progress(f"{status.kind} {request}") as progress:
            while not status.state.ended:
                _show(progress, status)
                path = f"/v1/requests/{request}?wait={POLL}&seen={status.state}"
                status = client.get(path, RequestStatus, timeout=POLL + 30)
    except KeyboardInterrupt:
        note(f"The request goes on. nnsight-hpc wait {request}, or nnsight-hpc cancel {request}")
        raise
    return status


def until_ended(client: HttpClient, request: str, timeout: float | None = None) -> RequestStatus:
    """The status of a request once it has ended, or as it is after `timeout` seconds; nothing is said meanwhile."""
    until = float("inf") if timeout is None else time.monotonic() + timeout
    status = client.get(f"/v1/requests/{request}", RequestStatus)
    while not status.state.ended and (left := until - time.monotonic()) > 0:
        path = f"/v1/requests/{request}?wait={min(left, LONG_POLL):.3f}&seen={status.state}"
        status = client.get(path, RequestStatus, timeout=LONG_POLL + 30)
    return status


def messages(client: HttpClient, request: str, *, wait: bool = True) -> Iterator[RequestLog]:
    """What a request says and how it stands, at each change and every so often, until it has ended; or only so far."""
    position, seen, seconds = 0, "", FIRST_POLL
    while True:
        path = f"/v1/requests/{request}/log?from={position}&wait={seconds if wait else 0:g}&seen={seen}"
        log = client.get(path, RequestLog, timeout=seconds + 30)
        yield log
        if log.complete or not (wait or log.lines):
            return
        seconds = FIRST_POLL if log.status.state != seen else LONG_POLL
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


def _show(progress: Progress, status: RequestStatus) -> None:
    if status.progress is not None and status.progress.tokens_total:
        dump = status.progress
        progress.show(dump_words(dump), done=dump.tokens, total=dump.tokens_total)
        return
    queue = f", {status.position} before it" if status.position else ""
    progress.show(f"{status.state.lower()} on {status.pool}{queue}{f': {status.note}' if status.note else ''}")


def dump_words(dump: DumpProgress) -> str:
    """Documents, tokens a second, bytes and the time left of a dump."""
    rate = dump.tokens / dump.seconds if dump.seconds else 0.0
    rest = dump.tokens_total - dump.tokens
    left = f", {duration(rest / rate)} left" if rate and rest else ""
    return f"{dump.documents}/{dump.documents_total} documents, {rate:.0f} tokens/s, {size(dump.bytes)}{left}"


def wait_until_ready(client: HttpClient, pool: PoolStatus, *, known: frozenset[str]) -> PoolStatus:
    """The pool once as many replicas serve as it is to have.

    Raises `ReplicaFailed`, with the end of its log, for one that ended before that; `known` are ids of replicas whose
    end is none of that: they had ended, or make way for what was asked for.
    """
    name = pool.spec.name
    with Progress(f"pool {name}") as progress:
        while sum(replica.state in _SERVING for replica in pool.replicas) < pool.spec.replicas:
            if failed := [one for one in pool.replicas if one.state.ended and one.id not in known]:
                raise _failed(client, failed[-1])
            check_not_held(pool)
            _show_loading(progress, pool)
            pool = _look_again(client, pool)
    return pool


def check_not_held(pool: PoolStatus) -> None:
    """Raise the error for which the daemon starts no more replicas of a pool, where there is one."""
    if pool.held is not None:
        raise from_report(pool.held)


def wait_until_empty(client: HttpClient, pool: PoolStatus) -> PoolStatus:
    """The pool's last status once no replica of it is left."""
    name = pool.spec.name
    with Progress(f"pool {name}") as progress:
        while left := [replica for replica in pool.replicas if not replica.state.ended]:
            progress.show(f"waits for {len(left)} worker{'s' * (len(left) > 1)}: {replica_words(left[-1])}")
            try:
                pool = _look_again(client, pool)
            except NotFound:
                break
    return pool


def _look_again(client: HttpClient, pool: PoolStatus) -> PoolStatus:
    """The pool after a change, or after a while; not more than ten times a second, whatever changes."""
    time.sleep(0.1)
    replica = newest(pool)
    path = f"/v1/pools/{pool.spec.name}?wait={POLL}&seen={'' if replica is None else replica.state}"
    return client.get(path, PoolStatus, timeout=POLL + 30)


def newest(pool: PoolStatus) -> ReplicaStatus | None:
    """The replica that was submitted last."""
    return max(pool.replicas, key=lambda replica: replica.submitted, default=None)


def replica_words(replica: ReplicaStatus) -> str:
    """State, job, host, and what it waits for."""
    parts = [replica.state.lower(), replica.job_id and f"job {replica.job_id}", replica.host and f"on {replica.host}"]
    return " ".join(filter(None, parts)) + (f": {replica.reason}" if replica.reason else "")


def _show_loading(progress: Progress, pool: PoolStatus) -> None:
    replica = newest(pool)
    if replica is None:
        progress.show("waits to be submitted")
    elif replica.total and replica.state is ReplicaState.LOADING:
        words = f"loads weights, {size(replica.loaded)} of {size(replica.total)}"
        progress.show(words, done=replica.loaded, total=replica.total)
    else:
        progress.show(replica_words(replica))


def _failed(client: HttpClient, replica: ReplicaStatus) -> ReplicaFailed:
    path = f"/v1/pools/{replica.pool}/log?lines=20&replica={replica.id}"
    try:
        log = client.call("GET", path).decode("utf-8", "replace").strip()
    except HpcError:
        log = ""
    return ReplicaFailed(
        f"the worker of pool {replica.pool} ended before it could serve",
        where=" ".join(
            filter(None, [f"replica {replica.id}", replica.job_id and f"job {replica.job_id}", replica.log])
        ),
        why=replica.reason if log in replica.reason else f"{replica.reason}\n{log}".strip(),
        next=f"put right what it says, then `nnsight-hpc up {replica.pool} …` again; "
        f"`nnsight-hpc down {replica.pool}` ends the pool",
    )
