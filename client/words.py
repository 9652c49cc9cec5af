"""Replicas and requests in words: their states and the causes of their ends, what they wait for, and since when."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from nnsight_hpc.client.tables import duration, moment, size
from nnsight_hpc.wire.states import ReplicaState

if TYPE_CHECKING:
    from nnsight_hpc.wire.messages import DumpProgress, RequestStatus
    from nnsight_hpc.wire.pools import PoolStatus, ReplicaStatus


def newest(pool: PoolStatus) -> ReplicaStatus | None:
    """The replica that was submitted last."""
    return max(pool.replicas, key=lambda replica: replica.submitted, default=None)


def alive(pool: PoolStatus) -> list[ReplicaStatus]:
    """Those that have not ended."""
    return [replica for replica in pool.replicas if not replica.state.ended]


def serving(pool: PoolStatus) -> int:
    """How many replicas take requests."""
    return sum(replica.state.serves for replica in pool.replicas)


def state_words(replica: ReplicaStatus) -> str:
    """The state; of one that loads how much it has, of one that has ended the cause."""
    state = replica.state.lower()
    if replica.state is ReplicaState.LOADING and replica.total:
        return f"{state} ({size(replica.loaded)} of {size(replica.total)})"
    return f"{state} ({replica.cause.words})" if replica.cause else state


def replica_words(replica: ReplicaStatus) -> str:
    """State, job, host, and what it waits for."""
    parts = [state_words(replica), replica.job_id and f"job {replica.job_id}", replica.host and f"on {replica.host}"]
    details = detail_words(replica)
    return " ".join(filter(None, parts)) + (f": {details}" if details else "")


def detail_words(replica: ReplicaStatus) -> str:
    """Why it is as it is, when it is expected to start, and whose place it is to take."""
    follows = f"follows {replica.succeeds}" if replica.succeeds and not replica.state.serves else ""
    return "; ".join(filter(None, [first_line(replica.reason), _start_words(replica), follows]))


def first_line(text: str) -> str:
    """What fits a line; `explain` has all of it."""
    return text.partition("\n")[0]


def _start_words(replica: ReplicaStatus) -> str:
    """A waiting job's place in its partition's queue and when it is expected to start, as far as these are known."""
    if replica.state not in (ReplicaState.SUBMITTED, ReplicaState.PENDING):
        return ""
    place = f"place {replica.position} in its partition's queue" if replica.position else ""
    start = f"expected start {coming(replica.begins)}" if replica.begins else ""
    return ", ".join(filter(None, [place, start]))


def coming(when: float) -> str:
    """A moment that is to come, and how far it is."""
    return f"{moment(when)}, in {duration(when - time.time())}"


def request_words(request: RequestStatus) -> str:
    """State and pool, the place in the queue, and what it waits for or says."""
    parts = [f"{request.state.lower()} on {request.pool}", *place_words(request)]
    said = request.waits_for or request.note
    return ", ".join(parts) + (f": {said}" if said else "")


def place_words(request: RequestStatus) -> list[str]:
    """How many are before one that waits, and when it is expected to start, as far as these are known."""
    before = [f"{request.position} before it"] if request.position else []
    return [*before, f"expected start {coming(request.starts)}"] if request.starts else before


def dump_words(dump: DumpProgress) -> str:
    """Documents, tokens a second, bytes and the time left of a dump."""
    rate, left = dump_rate(dump), time_left(dump)
    rest = f", {duration(left)} left" if left else ""
    workers = f", {dump.workers} workers" if dump.workers > 1 else ""
    return f"{dump.documents}/{dump.documents_total} documents, {rate:.0f} tokens/s{workers}, {size(dump.bytes)}{rest}"


def dump_rate(dump: DumpProgress) -> float:
    """Tokens a second: of those that write it now, or of the whole once it has ended."""
    return dump.speed or (dump.tokens / dump.seconds if dump.seconds else 0.0)


def time_left(dump: DumpProgress) -> float:
    """Seconds, at the speed of those that write it now; 0 where nobody does."""
    return (dump.tokens_total - dump.tokens) / dump.speed if dump.speed else 0.0
