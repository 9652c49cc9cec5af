"""The pools of the small daemon for the client's tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import web

from nnsight_hpc.wire.errors import ErrorReport, NotFound, from_report
from nnsight_hpc.wire.pools import Garbage, LogPart, Plan, PoolSpec, PoolStatus
from nnsight_hpc.wire.states import ReplicaState

if TYPE_CHECKING:
    from nnsight_hpc.wire.messages import Story
    from nnsight_hpc.wire.pools import ReplicaStatus


def answer(message: Any) -> web.Response:
    return web.Response(body=msgspec.json.encode(message), content_type="application/json")


class PoolsServer:
    """Pools as the contract has them, but that nothing happens by itself.

    `replicas` are the states a new replica goes through, one with each look at its pool; `logs` the parts of its log, one
    with each look at it. `given` has the keys that came for each pool, `queries` those of logs, requests and gc.
    """

    def __init__(self) -> None:
        self.pools: dict[str, PoolStatus] = {}
        self.given: dict[str, dict[str, Any]] = {}
        self.queries: list[dict[str, str]] = []
        self.replicas: list[ReplicaStatus] = []
        self.held: ErrorReport | None = None
        self.starts: float | None = None
        self.logs = ["the replica's log\n"]
        self.stories: dict[str, Story] = {}
        self.garbage = Garbage()

    def routes(self) -> list[web.RouteDef]:
        return [
            web.put("/v1/pools/{name}", self._put_pool),
            web.get("/v1/pools/{name}", self._get_pool),
            web.delete("/v1/pools/{name}", self._delete_pool),
            web.delete("/v1/pools", self._delete_pools),
            web.post("/v1/pools/{name}/plan", self._plan),
            web.post("/v1/pools/{name}/resume", self._resume),
            web.get("/v1/pools/{name}/story", self._story),
            web.get("/v1/requests/{name}/story", self._story),
            web.get("/v1/pools/{name}/log", self._pool_log),
            web.post("/v1/gc", self._gc),
        ]

    async def _put_pool(self, request: web.Request) -> web.Response:
        spec = await self._spec(request)
        before = self.pools.get(spec.name)
        kept = before.replicas if before else ()
        replicas = kept + tuple(self.replicas[:1])
        del self.replicas[:1]
        self.pools[spec.name] = PoolStatus(spec=spec, desired=max(spec.least, 1), replicas=replicas, held=self.held)
        if self.held is not None:
            raise from_report(self.held)
        return answer(self.pools[spec.name])

    async def _spec(self, request: web.Request) -> PoolSpec:
        """What a body of keys stands for, with the program's own defaults."""
        given = self.given[request.match_info["name"]] = msgspec.json.decode(await request.read())
        return msgspec.convert(given, PoolSpec)

    async def _plan(self, request: web.Request) -> web.Response:
        spec = await self._spec(request)
        notes = ("sinfo did not answer: nothing was checked",)
        return answer(Plan(spec=spec, script="#!/bin/bash\nexit\n", path="/r/script", starts=self.starts, notes=notes))

    async def _resume(self, request: web.Request) -> web.Response:
        pool = self.find_pool(request)
        self.pools[pool.spec.name] = msgspec.structs.replace(pool, held=None)
        return answer(self.pools[pool.spec.name])

    async def _story(self, request: web.Request) -> web.Response:
        return answer(self.stories[request.match_info["name"]])

    async def _gc(self, request: web.Request) -> web.Response:
        self.queries.append(dict(request.query))
        return answer(self.garbage)

    async def _delete_pools(self, _request: web.Request) -> web.Response:
        """Each pool drains; what has no pool is told."""
        for name, pool in self.pools.items():
            leaving = tuple(msgspec.structs.replace(one, state=ReplicaState.DRAINING) for one in pool.replicas)
            self.pools[name] = msgspec.structs.replace(pool, desired=0, down=True, replicas=leaving)
        return answer(self.garbage)

    async def _get_pool(self, request: web.Request) -> web.Response:
        pool = self.find_pool(request)
        if request.query.get("wait") and self.replicas:
            current = self.replicas.pop(0)
            others = tuple(one for one in pool.replicas if one.id != current.id)
            pool = self.pools[pool.spec.name] = msgspec.structs.replace(pool, replicas=(*others, current))
        return answer(pool)

    async def _delete_pool(self, request: web.Request) -> web.Response:
        pool = self.find_pool(request)
        ended = tuple(msgspec.structs.replace(one, state=ReplicaState.ENDED) for one in pool.replicas)
        del self.pools[pool.spec.name]
        return answer(msgspec.structs.replace(pool, desired=0, replicas=ended))

    async def _pool_log(self, request: web.Request) -> web.Response:
        """The first of `logs` to who begins, then one at each look; `next` is its number."""
        self.find_pool(request)
        self.queries.append(dict(request.query))
        number = int(request.query.get("from", 0))
        ended = number + 1 == len(self.logs)
        return answer(LogPart(replica="smol-1", text=self.logs[number], next=number + 1, ended=ended))

    def find_pool(self, request: web.Request) -> PoolStatus:
        if request.match_info["name"] not in self.pools:
            raise NotFound(
                f"there is no pool {request.match_info['name']!r}", why=f"there are: {', '.join(self.pools)}"
            )
        return self.pools[request.match_info["name"]]
