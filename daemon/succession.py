"""Who follows a replica when its walltime ends, and from when on.

Its successor is submitted as soon as the pool's load time is known, to begin so early that it serves before the replica
takes nothing new. Once it serves, the replica finishes what it runs and ends. All of it follows from what is known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nnsight_hpc.daemon.steps import Release, Submit
from nnsight_hpc.wire.states import EndCause

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nnsight_hpc.daemon.config import Config
    from nnsight_hpc.daemon.records import Pool, Replica
    from nnsight_hpc.daemon.steps import Step

_GROWTH = 1.5
"""A load may take so much longer than the last one."""


def lead(pool: Pool, config: Config) -> float:
    """How many seconds before its predecessor's end a successor's job is to begin; at most half of the walltime."""
    load = _GROWTH * (pool.load_seconds or 0.0)
    return min(pool.farewell + load + pool.wait_seconds + pool.drain_seconds + config.margin, pool.walltime / 2)


def successions(
    pool: Pool, wanted: Sequence[Replica], present: Sequence[Replica], now: float, config: Config
) -> list[Step]:
    """The successors to submit, and the replicas whose successors serve.

    Parameters
    ----------
    wanted
        The pool's replicas that are to stay, successors included.
    present
        Those of them that are no successors.
    """
    steps: list[Step] = []
    for replica in present:
        heirs = [other for other in wanted if other.status.succeeds == replica.id]
        if serving := next((heir for heir in heirs if heir.serves), None):
            steps.append(Release(replica, EndCause.DRAINED, f"its successor {serving.id} serves", hurry=False))
        elif not heirs and _is_due(pool, replica):
            assert replica.status.ends is not None
            begin = replica.status.ends - lead(pool, config)
            steps.append(Submit(succeeds=replica.id, begin=begin if begin > now else None))
    return steps


def too_late(present: Sequence[Replica], now: float, config: Config) -> list[Step]:
    """Successors whose predecessor has ended early, and that would begin much later than a new job may."""
    return [
        Release(replica, EndCause.DRAINED, f"{replica.status.succeeds}, which it was to follow, has ended")
        for replica in present
        if replica.waits and replica.begin is not None and replica.begin > now + config.begins_soon
    ]


def _is_due(pool: Pool, replica: Replica) -> bool:
    if not pool.overlaps or pool.held is not None or pool.load_seconds is None:
        return False
    return replica.status.ends is not None and not replica.waits
