"""What the dashboard shows of a daemon: the pools, what waits and runs, and one user's own requests.

However much waits, what goes first is sent, and numbers for the rest.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from typing import TYPE_CHECKING

import msgspec

from nnsight_hpc.daemon.counters import SPAN, STEP
from nnsight_hpc.wire.dashboard import Dashboard, Ended, PoolView, ReplicaView, RequestView, UserLoad
from nnsight_hpc.wire.messages import encode

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nnsight_hpc.daemon.parts import Parts
    from nnsight_hpc.wire.messages import RequestStatus
    from nnsight_hpc.wire.pools import PoolStatus, ReplicaStatus

_MOST = 50
"""Requests of a list that are sent, and users."""
_LONGEST = 300
"""Characters of a line."""


class DashboardView:
    """Looks at the parts of a daemon."""

    def __init__(self, parts: Parts) -> None:
        self._hello, self._pools, self._requests, self._views = parts.hello, parts.pools, parts.requests, parts.views

    async def of(self, user: str, *, owner: bool) -> Dashboard:
        """The daemon as `user` may see it."""
        own = await self._requests_of(user)
        queue = [one for one in await self._requests_of(None) if not one.state.ended] if owner else []
        now, waiting = time.time(), self._requests.scheduler.waiting()
        pools = tuple(map(self._pool, self._pools.names()))
        lately = self._requests.counters.recent.since(now - SPAN)
        shown = Dashboard(
            version="",
            now=0.0,
            daemon=msgspec.structs.replace(self._hello, user=user),
            owner=owner,
            pools=pools,
            queued=waiting.total(),
            running=sum(pool.running for pool in pools),
            own_queued=waiting[user],
            own=tuple(_request(one, now) for one in own),
            queue=tuple(_request(one, now) for one in queue),
            users=tuple(self._users(waiting)) if owner else (),
            step=STEP,
            span=SPAN,
            ended=tuple(Ended(time=when, count=count) for when, count in lately),
        )
        return msgspec.structs.replace(shown, version=hashlib.sha256(encode(shown)).hexdigest()[:16], now=now)

    async def _requests_of(self, user: str | None) -> list[RequestStatus]:
        """Those of one user or of all, as many as are shown: what runs, what goes next, the latest that have ended."""
        return sorted(await self._views.overview(user, _MOST), key=_place)

    def _pool(self, name: str) -> PoolView:
        status = self._pools.status(name)
        demand = self._requests.demand(name)
        return PoolView(
            name=name,
            model=_line(status.spec.model),
            desired=status.desired,
            queued=demand.queued,
            running=demand.running,
            note=_line(_note(status)),
            replicas=tuple(_replica(one) for one in _shown(status)),
        )

    def _users(self, waiting: Counter[str]) -> Iterator[UserLoad]:
        """Those of whom most waits or runs."""
        running = Counter(held.user for held in self._requests.holdings.all())
        for user, _ in (waiting + running).most_common(_MOST):
            yield UserLoad(user=user, queued=waiting[user], running=running[user])


def _place(request: RequestStatus) -> tuple[int, float]:
    """What runs comes first, then what goes next, then the latest that have ended."""
    since = max(request.times.values(), default=0.0)
    if request.state.ended:
        return 2, -since
    return (0, since) if request.position is None else (1, request.position)


def _request(status: RequestStatus, now: float) -> RequestView:
    dump = status.progress
    return RequestView(
        id=status.id,
        kind=status.kind,
        pool=status.pool,
        user=status.user,
        state=status.state,
        since=max(status.times.values(), default=0.0),
        before=status.position,
        starts_in=None if status.starts is None else max(0.0, round(status.starts - now, 1)),
        done=dump.tokens / dump.tokens_total if dump and dump.tokens_total else None,
        error=_line(status.error.what) if status.error else "",
    )


def _shown(pool: PoolStatus) -> Iterator[ReplicaStatus]:
    """Those that have not ended; while there is none, also the last that has."""
    present = [one for one in pool.replicas if not one.state.ended]
    yield from present or pool.replicas[-1:]


def _replica(status: ReplicaStatus) -> ReplicaView:
    return ReplicaView(
        id=status.id,
        state=status.state,
        job_id=status.job_id,
        host=status.host,
        reason=_line(status.reason),
        cause=status.cause.words if status.cause else "",
        loaded=status.loaded,
        total=status.total,
        free=status.free,
        begins=status.begins,
        position=status.position,
        ends=status.ends,
        succeeds=status.succeeds,
    )


def _note(pool: PoolStatus) -> str:
    if pool.held is not None:
        return f"held: {pool.held.what}"
    return "is taken down" if pool.down else pool.note


def _line(text: str) -> str:
    """What fits a line; `explain` has all of it."""
    return text.partition("\n")[0][:_LONGEST]
