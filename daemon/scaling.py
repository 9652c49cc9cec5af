"""How many replicas a pool is to have now: between its least and its most, as many as its queue asks for.

All of it follows from what is known: the pool, its replicas (without successors), what is asked of it, and the time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from nnsight_hpc.daemon.words import duration
from nnsight_hpc.wire.states import ReplicaState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nnsight_hpc.daemon.backlog import Demand
    from nnsight_hpc.daemon.config import Config
    from nnsight_hpc.daemon.records import Pool, Replica


class Scale(NamedTuple):
    """How many there are to be, why that has changed (empty: it has not), and which replica is idle and can go."""

    desired: int
    because: str = ""
    idle: Replica | None = None


def scale(pool: Pool, present: Sequence[Replica], demand: Demand, now: float, config: Config) -> Scale:
    """One step at most, up or down.

    Parameters
    ----------
    present
        The pool's replicas that are to stay, without successors.
    """
    if pool.down:
        return Scale(0)
    least, most = pool.spec.least, pool.spec.most
    desired = min(max(pool.desired, least), most)
    if desired != pool.desired or pool.held is not None:
        return Scale(desired, "the pool may have another number of them now" if desired != pool.desired else "")
    if desired < most and (why := _too_few(pool, present, demand, now, config)):
        return Scale(desired + 1, why)
    if desired > least and demand.queued == 0 and (idle := _idle(pool, present, now, config)):
        return Scale(desired - 1, f"nobody has used {idle.id} for {duration(now - idle.used)}", idle)
    return Scale(desired)


def _too_few(pool: Pool, present: Sequence[Replica], demand: Demand, now: float, config: Config) -> str:
    """Why one more replica is wanted; nothing while one is on its way, since that may do."""
    if demand.queued == 0 or demand.oldest is None:
        return ""
    if pool.desired == 0:
        return "a request waits, and there is no replica"
    if len(present) < pool.desired or not all(replica.serves for replica in present):
        return ""
    if demand.queued > config.scale_queue * len(present):
        return f"{demand.queued} requests wait for {len(present)} replicas"
    if now - demand.oldest > config.scale_wait:
        return f"a request has waited for {duration(now - demand.oldest)}"
    return ""


def _idle(pool: Pool, present: Sequence[Replica], now: float, config: Config) -> Replica | None:
    """Of those that nobody has used for the pool's idle time the one with the least walltime left."""
    limit = config.idle if pool.spec.idle_seconds is None else pool.spec.idle_seconds
    idle = [r for r in present if r.serves and r.state != ReplicaState.BUSY and now - r.used >= limit]
    return min(idle, key=lambda r: r.status.ends or float("inf"), default=None)
