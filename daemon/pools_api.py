"""The HTTP interface for pools: what is wanted, what there is, what their workers say."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import web

from nnsight_hpc.daemon.logs import MOST_LINES
from nnsight_hpc.daemon.planning import plan
from nnsight_hpc.daemon.pool_spec import check_spec
from nnsight_hpc.daemon.replica_log import last_part, next_part
from nnsight_hpc.daemon.site import read_site
from nnsight_hpc.daemon.web import LAST_BYTE, LONGEST_WAIT, answer, number
from nnsight_hpc.wire.errors import NotFound, from_report
from nnsight_hpc.wire.messages import Story, decode
from nnsight_hpc.wire.pools import LogPart
from nnsight_hpc.wire.states import ReplicaState

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from nnsight_hpc.daemon.garbage import Collector
    from nnsight_hpc.daemon.parts import Parts
    from nnsight_hpc.daemon.records import Replica
    from nnsight_hpc.wire.pools import PoolSpec, PoolStatus

_UP_SECONDS = 3.5
"""How long `up` waits for a job id and a reason at most; Slurm is asked two seconds after it was given the job."""
_LOOK_SECONDS = 1.0
"""How often a log that is followed is looked at: nobody tells when it grows."""
_NOT_BEGUN = (ReplicaState.SUBMITTED, ReplicaState.DRAINING, ReplicaState.ENDED)
_MOST_RANKS = 1e6


class PoolsApi:
    def __init__(self, parts: Parts, collector: Collector) -> None:
        self._parts, self._collector = parts, collector
        self._pools, self._requests, self._reconciler = parts.pools, parts.requests, parts.reconciler
        self._changes, self._places = parts.changes, parts.config.places

    def routes(self) -> list[web.RouteDef]:
        return [
            web.put("/v1/pools/{name}", self._put),
            web.get("/v1/pools/{name}", self._get),
            web.delete("/v1/pools/{name}", self._delete),
            web.delete("/v1/pools", self._delete_all),
            web.post("/v1/pools/{name}/plan", self._plan),
            web.post("/v1/pools/{name}/resume", self._resume),
            web.get("/v1/pools/{name}/story", self._story),
            web.get("/v1/pools/{name}/log", self._log),
        ]

    async def _put(self, request: web.Request) -> web.Response:
        """The body has the keys that were given; the site may have others, and the rest is as `PoolSpec` has it."""
        spec, _ = await self._asked(request)
        await self._pools.put(spec)
        return answer(await self._begun(spec.name))

    async def _plan(self, request: web.Request) -> web.Response:
        spec, note = await self._asked(request)
        return answer(await asyncio.to_thread(plan, spec, note, self._parts.executor, self._places))

    async def _asked(self, request: web.Request) -> tuple[PoolSpec, str]:
        """The pool that the body asks for, checked by all who know something of it, and what the site has filled in."""
        name, given = request.match_info["name"], decode(await request.read(), dict[str, Any], what="pool")
        site = await asyncio.to_thread(read_site)
        spec = site.complete(name, given)
        check_spec(spec, name)
        await asyncio.to_thread(self._parts.executor.check, spec)
        return spec, site.filled_in(given)

    async def _resume(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        await self._pools.resume(name)
        return answer(await self._begun(name))

    async def _begun(self, name: str) -> PoolStatus:
        """The status once all replicas that are wanted have jobs and are more than submitted, or after some seconds."""
        self._reconciler.try_now(name)

        status = await self._wait(name, _has_begun, _UP_SECONDS)
        if status.held is not None:
            raise from_report(status.held)
        return status

    async def _get(self, request: web.Request) -> web.Response:
        name, wait = request.match_info["name"], number(request, "wait", default=0, most=LONGEST_WAIT)
        before = self._pools.newest(name)
        seen = request.query.get("seen", before.state if before else "")

        def news(status: PoolStatus) -> bool:
            newest = self._pools.newest(name)
            return newest != before or (newest.state if newest else "") != seen or status.held is not None

        return answer(await self._wait(name, news, wait))

    async def _delete(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        before = self._status(name)
        await take_down(self._parts, name)
        self._reconciler.try_now(name)
        gone = self._pools.find(name) is None  # it had no replica
        return answer(msgspec.structs.replace(before, desired=0, down=True, queued=0) if gone else self._status(name))

    async def _delete_all(self, _: web.Request) -> web.Response:
        """All pools, and jobs of ours that no pool knows; answers which those were."""
        await take_all_down(self._parts)
        return answer(await self._collector.end_strays())

    async def _story(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        events = await self._parts.stories.of(f"pool:{name}")
        if not events:
            self._pools.get(name)  # says which there are
        return answer(Story(now=self._now(name), events=tuple(events)))

    def _now(self, name: str) -> str:
        """How a pool stands, in one sentence."""
        if self._pools.find(name) is None:
            return f"there is no pool {name} any more"
        status, demand = self._status(name), self._requests.demand(name)
        serving = sum(one.state.serves for one in status.replicas)
        replicas = f"replicas: {status.desired} wanted, {serving} serving"
        requests = f"requests: {demand.queued} waiting, {demand.running} running"
        return "; ".join(filter(None, (replicas, requests, status.held.what if status.held else status.note)))

    async def _wait(self, name: str, enough: Callable[[PoolStatus], bool], seconds: float) -> PoolStatus:
        """The status as soon as it is `enough`, or after `seconds`."""

        async def read() -> PoolStatus:
            return self._status(name)

        return await self._changes.wait(f"pool:{name}", read, enough, seconds)

    def _status(self, name: str) -> PoolStatus:
        return self._pools.status(name, self._requests.demand(name).queued)

    # -- logs ----------------------------------------------------------------------------------------------------

    async def _log(self, request: web.Request) -> web.Response:
        """The last lines, or what follows a byte: then it is waited for."""
        replica = await self._replica(request)
        rank = _rank(request, replica)
        if "from" in request.query:
            return answer(await self._follow(request, replica.id, rank))
        lines = int(number(request, "lines", default=50, most=MOST_LINES))
        ended = replica.state.ended
        text, end = await asyncio.to_thread(last_part, self._path(replica.id), lines, rank, ended=ended)
        return answer(LogPart(replica=replica.id, text=text, next=end, ended=ended))

    async def _follow(self, request: web.Request, replica: str, rank: int | None) -> LogPart:
        start = int(number(request, "from", default=0, most=LAST_BYTE))
        wait = number(request, "wait", default=0, most=LONGEST_WAIT)

        async def read() -> LogPart:
            ended = self._has_ended(replica)  # before the file is read: what it wrote last is then there
            text, end = await asyncio.to_thread(next_part, self._path(replica), start, rank, ended=ended)
            return LogPart(replica=replica, text=text, next=end, ended=ended and end == start)

        def enough(part: LogPart) -> bool:
            return part.next != start or part.ended

        key = f"pool:{request.match_info['name']}"
        return await self._changes.wait(key, read, enough, wait, every=_LOOK_SECONDS)

    async def _replica(self, request: web.Request) -> Replica:
        """The replica that was asked for; else the newest that has written something, or the newest."""
        name, wanted = request.match_info["name"], request.query.get("replica")
        self._pools.get(name)
        replicas = [one for one in self._pools.of(name) if wanted in (None, one.id)]
        if not replicas:
            raise NotFound(f"pool {name} has no replica{f' {wanted}' if wanted else ' yet'}")
        return await asyncio.to_thread(self._newest_with_log, replicas)

    def _newest_with_log(self, replicas: list[Replica]) -> Replica:
        return next((one for one in reversed(replicas) if self._path(one.id).exists()), replicas[-1])

    def _has_ended(self, replica: str) -> bool:
        return not any(one.id == replica for one in self._pools.replicas())

    def _path(self, replica: str) -> Path:
        return self._places.replica(replica) / "log"


async def take_down(parts: Parts, name: str) -> None:
    """Want no replica of a pool any more, and fail what waits for it."""
    await parts.pools.delete(name)
    await parts.requests.hopeless.fail([name])


async def take_all_down(parts: Parts) -> None:
    for name in parts.pools.names():
        with suppress(NotFound):  # it was going down, and has gone
            await take_down(parts, name)
        parts.reconciler.try_now(name)


def _has_begun(status: PoolStatus) -> bool:
    begun = [one for one in status.replicas if one.state not in _NOT_BEGUN]
    return status.held is not None or len(begun) >= status.desired


def _rank(request: web.Request, replica: Replica) -> int | None:
    """The rank whose lines are wanted; None for all lines, as where there is only one rank (its lines have no label)."""
    if "rank" not in request.query:
        return None
    rank, ranks = int(number(request, "rank", default=0, most=_MOST_RANKS)), replica.spec.tp
    if rank >= ranks:
        raise NotFound(f"replica {replica.id} has no rank {rank}", why=f"it has {ranks}, and the first is 0")
    return rank if ranks > 1 else None
