"""What a pool waits for, in words for those who wait for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nnsight_hpc.daemon.records import primaries, wanted
from nnsight_hpc.daemon.words import duration, ended_words, loaded_words
from nnsight_hpc.wire.states import ReplicaState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nnsight_hpc.daemon.records import Pool, Replica
    from nnsight_hpc.wire.pools import ReplicaStatus

_R = ReplicaState
_ORDER = (_R.LOADING, _R.STARTING, _R.PENDING, _R.SUBMITTED)
"""Of several replicas that are on their way, the one that is farthest is waited for."""


def note(pool: Pool, replicas: Sequence[Replica], trouble: str, now: float) -> str:
    """One sentence or two; empty when the pool serves and nothing is to be said.

    Parameters
    ----------
    trouble
        Why the batch system could not be asked, if so.
    """
    doubt = trouble and f"what has become of its jobs is not known just now: {trouble}"
    return "; ".join(filter(None, [_main(pool, replicas, now), _one_at_a_time(pool), doubt]))


def _main(pool: Pool, replicas: Sequence[Replica], now: float) -> str:
    if pool.down:
        return "it is being taken down"
    present = primaries(wanted(pool, replicas))
    if any(replica.serves for replica in present):
        return ""
    coming = [replica for state in _ORDER for replica in present if replica.state == state]
    if coming:
        return _coming(coming[0].status, now)
    if pool.held is not None:
        return pool.held.what
    if pool.desired == 0:
        return "no replica: one is started when a request arrives"
    return _missing(replicas)


def _coming(status: ReplicaStatus, now: float) -> str:
    job = f"job {status.job_id}" if status.job_id else f"replica {status.id}"
    match status.state:
        case _R.LOADING:
            return f"{job} runs on {status.host}; {loaded_words(status)}"
        case _R.STARTING:
            return f"{job} runs on {status.host}; its worker has not registered yet"
        case _R.PENDING:
            begins = status.begins or 0.0
            start = f" (expected to start in {duration(begins - now)})" if begins > now else ""
            return f"{job} waits{start}: {status.reason}" if status.reason else f"{job} waits{start}"
        case _:
            return f"{job} has been submitted" if status.job_id else status.reason or f"{job} is being submitted"


def _missing(replicas: Sequence[Replica]) -> str:
    ended = [replica.status for replica in replicas if replica.state.ended]
    if not ended:
        return "a replica is being submitted"
    return f"the next replica is being submitted; the last one {ended_words(ended[-1])}"


def _one_at_a_time(pool: Pool) -> str:
    if pool.overlaps or pool.desired == 0:
        return ""
    why = f"{pool.gap}; resume tries a successor again" if pool.gap else "succession is gap"
    return f"one job at a time ({why}): when a replica's walltime ends, requests wait until the next one has loaded"
