"""The HTTP interface for the models of pools: the small files with which a laptop can trace without the weights."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from aiohttp import web

from nnsight_hpc.daemon.records import holds_model
from nnsight_hpc.daemon.web import answer, file
from nnsight_hpc.wire.errors import Conflict, InvalidInput, NotFound
from nnsight_hpc.wire.messages import ModelIdentity, PoolModel
from nnsight_hpc.wire.skeleton import describe, skeleton_files

if TYPE_CHECKING:
    from nnsight_hpc.daemon.parts import Parts
    from nnsight_hpc.daemon.records import Pool


class ModelsApi:
    """They come from a worker's copy; before there is one, from the model's folder, where the daemon can read it."""

    def __init__(self, parts: Parts) -> None:
        self._pools, self._places = parts.pools, parts.config.places

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v1/pools/{name}/model", self._model),
            web.get("/v1/pools/{name}/model/{file}", self._file),
        ]

    async def _model(self, request: web.Request) -> web.Response:
        pool = self._pools.get(request.match_info["name"])
        files = await asyncio.to_thread(lambda: describe(self._folder(pool)))
        identity = pool.model or ModelIdentity(id=pool.spec.model, revision=pool.spec.revision)
        return answer(PoolModel(model=identity, files=files))

    async def _file(self, request: web.Request) -> web.StreamResponse:
        pool, name = self._pools.get(request.match_info["name"]), request.match_info["file"]
        found = await asyncio.to_thread(lambda: skeleton_files(self._folder(pool)))
        for path in found:
            if path.name == name:
                return file(path)
        raise NotFound(
            f"the model of pool {pool.spec.name} has no file {name!r} to hand out",
            why=f"there are {', '.join(path.name for path in found)}",
        )

    def _folder(self, pool: Pool) -> Path:
        """Where the files are; raises `Conflict` while nobody here has seen them, `InvalidInput` where there are none."""
        name = pool.spec.name
        if pool.spec.factory:
            raise InvalidInput(
                f"pool {name} holds a module of its owner's, no language model with a configuration to hand out",
                where=f"factory {pool.spec.factory}",
                next="trace with NNsight(module), where the module has the same weights",
            )
        copies = [self._places.model_copy(replica.id) for replica in self._pools.of(name) if holds_model(replica, pool)]
        candidates = [*reversed(copies), Path(pool.spec.model).expanduser()]
        for folder in candidates:
            if folder.is_absolute() and skeleton_files(folder):
                return folder
        newest = self._pools.newest(name)
        state = f"{newest.state.lower()}: {newest.reason}" if newest else "not submitted yet"
        raise Conflict(
            f"the configuration of the model {pool.spec.model} is not known yet",
            where=f"pool {name}",
            why=f"the first worker of the pool finds it; it is {state}",
            next=f"`nnsight-hpc up {name} … --wait`, then try again",
        )
