"""What is to be done about a pool now. All of it follows from what is known, so that each rule can be tested alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from nnsight_hpc.daemon.health import lost
from nnsight_hpc.daemon.records import primaries, wanted
from nnsight_hpc.daemon.scaling import scale
from nnsight_hpc.daemon.steps import Cancel, Lose, Release, Submit
from nnsight_hpc.daemon.succession import successions, too_late
from nnsight_hpc.wire.states import EndCause

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nnsight_hpc.daemon.backlog import Demand
    from nnsight_hpc.daemon.config import Config
    from nnsight_hpc.daemon.records import Pool, Replica
    from nnsight_hpc.daemon.steps import Step


class Decision(NamedTuple):
    """How many replicas the pool is to have, why that has changed (empty: it has not), and the steps to take."""

    desired: int
    because: str
    steps: tuple[Step, ...]


def decide(
    pool: Pool,
    replicas: Sequence[Replica],
    demand: Demand,
    heard: Callable[[str], float],
    *,
    now: float,
    config: Config,
) -> Decision:
    """The next step of everything.

    Parameters
    ----------
    replicas
        Those of the pool that have not ended.
    heard
        When the worker of a replica was last heard.
    """
    gone: list[Step] = [Lose(r, why) for r in replicas if (why := lost(r, heard(r.id), now, config))]
    alive = [replica for replica in replicas if replica not in _replicas_of(gone)]
    gone += _leaving(pool, alive, now)
    staying = wanted(pool, alive)
    gone += too_late(primaries(staying), now, config)
    staying = [replica for replica in staying if replica not in _replicas_of(gone)]
    present = primaries(staying)
    scaled = scale(pool, present, demand, now, config)
    surplus = _surplus(staying, present, scaled.desired, scaled.idle)
    kept = [replica for replica in present if replica not in _replicas_of(surplus)]
    steps = [*gone, *surplus, *successions(pool, staying, kept, now, config)]
    if pool.held is None:
        steps += [Submit()] * (scaled.desired - len(kept))
    return Decision(scaled.desired, scaled.because, tuple(steps))


def _leaving(pool: Pool, replicas: Sequence[Replica], now: float) -> list[Step]:
    """Those that are not what the pool is to be, and those that were told to end and take too long."""
    steps: list[Step] = []
    for replica in replicas:
        if replica.drain:
            if replica.until is not None and now >= replica.until:
                steps.append(Cancel(replica))
            elif replica.until is None and pool.down:
                steps.append(Release(replica, EndCause.DRAINED, "the pool is taken down"))
        elif not replica.leaves and not wanted(pool, [replica]):
            why = "the pool is taken down" if pool.down else "the pool was changed"
            steps.append(Release(replica, EndCause.DRAINED, why))
    return steps


def _surplus(staying: Sequence[Replica], present: Sequence[Replica], desired: int, idle: Replica | None) -> list[Step]:
    """Those that are too many: the idle one, then those that are least far, then those with the least walltime left.

    Their successors go with them.
    """
    order = sorted(present, key=lambda r: (r is not idle, r.serves, not r.waits, _value(r)))
    too_many = order[: max(0, len(order) - desired)]
    ids = {replica.id for replica in too_many}
    heirs = [replica for replica in staying if replica.status.succeeds in ids]
    return [
        Release(replica, EndCause.IDLE, "nobody has used it for the pool's idle time")
        if replica is idle
        else Release(replica, EndCause.DRAINED, "there are more replicas than wanted")
        for replica in (*too_many, *heirs)
    ]


def _value(replica: Replica) -> float:
    """Of two that serve, the one with more walltime left stays; of two that do not, the one that was submitted first."""
    return (replica.status.ends or float("inf")) if replica.serves else -replica.status.submitted


def _replicas_of(steps: Sequence[Step]) -> list[Replica]:
    return [step.replica for step in steps if not isinstance(step, Submit)]
