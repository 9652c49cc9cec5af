"""The HTTP interface for datasets: dumps are sent, and what they wrote is listed, fetched and removed."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import time
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from nnsight_hpc.daemon.frames import check_dump
from nnsight_hpc.daemon.new_request import NewRequest
from nnsight_hpc.daemon.policy import check_captures, check_graph, check_has_texts
from nnsight_hpc.daemon.refusals import fingerprint_error, needs_error
from nnsight_hpc.daemon.sharing import may_see
from nnsight_hpc.daemon.web import answer, file, needs_of, priority_of, required
from nnsight_hpc.storage import dataset_folder
from nnsight_hpc.storage.describe import absent, dataset_names, describe, file_to_fetch, files_to_fetch
from nnsight_hpc.wire.errors import Conflict
from nnsight_hpc.wire.messages import DatasetStatus

if TYPE_CHECKING:
    from pathlib import Path
    from typing import BinaryIO

    from nnsight_hpc.daemon.arrivals import Arrivals
    from nnsight_hpc.daemon.parts import Parts
    from nnsight_hpc.daemon.records import Pool
    from nnsight_hpc.daemon.table import Row
    from nnsight_hpc.graph import Graph
    from nnsight_hpc.wire.messages import DumpSpec


class DatasetsApi:
    def __init__(self, parts: Parts, arrivals: Arrivals) -> None:
        self._pools, self._requests, self._views, self._arrivals = parts.pools, parts.requests, parts.views, arrivals
        self._folder, self._owner = parts.config.places.datasets, parts.hello.owner

    def routes(self) -> list[web.RouteDef]:
        return [
            web.put("/v1/datasets/{name}", self._put),
            web.get("/v1/datasets", self._list),
            web.get("/v1/datasets/{name}", self._get),
            web.delete("/v1/datasets/{name}", self._delete),
            web.get("/v1/datasets/{name}/files", self._files),
            web.get("/v1/datasets/{name}/files/{path:.+}", self._file),
        ]

    async def _put(self, request: web.Request) -> web.Response:
        received, name, request_id = time.time(), request.match_info["name"], required(request, "request")
        needs, priority = needs_of(request), priority_of(request)

        async def describe(file: BinaryIO) -> NewRequest:
            dataset_folder(self._folder, name)
            dump, graph = await asyncio.to_thread(check_dump, file, name)
            pool = request.query.get("pool") or (
                self._pools.for_model(graph.model) if graph else required(request, "pool")
            )
            await asyncio.to_thread(self._check, dump, graph, self._pools.accepting(pool))
            if error := needs_error(pool, needs, self._pools.longest(pool)):
                raise error
            return NewRequest(
                id=request_id,
                kind="dump",
                pool=pool,
                user=request["user"],
                received=received,
                fingerprint=graph.model.fingerprint if graph else "",
                needs=needs,
                priority=priority,
                dump=None if dump.measure else dump,
            )

        await self._arrivals.receive(request, request_id, describe)
        return answer(await self._views.status(request_id))

    def _check(self, dump: DumpSpec, graph: Graph | None, held: Pool) -> None:
        """Raise why a dump does not fit its pool, or is more than the pool's policy allows."""
        check_has_texts(held.spec)
        if graph is None:
            check_captures(dump, held.spec, self._owner)
            return
        if error := fingerprint_error(held.spec.name, held.model, graph.model.fingerprint):
            raise error
        check_graph(graph, held.spec, self._owner)

    async def _list(self, request: web.Request) -> web.Response:
        rows = await self._views.datasets()
        written = await asyncio.to_thread(dataset_names, self._folder)
        users = {name: rows[name].user if name in rows else self._owner for name in sorted({*rows, *written})}
        own = [name for name, user in users.items() if may_see(request, user)]
        return answer([await self._status(name, rows.get(name)) for name in own])

    async def _get(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        return answer(await self._status(name, await self._views.dataset(name)))

    async def _delete(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        row = await self._views.dataset(name)
        status = await self._status(name, row)
        if row is not None and not row.state.ended:
            raise Conflict(
                f"dataset {name} is being written",
                where=f"request {row.id}",
                next=f"`nnsight-hpc cancel {row.id}` first",
            )
        await asyncio.to_thread(_remove, dataset_folder(self._folder, name))
        await self._requests.retention.forget_dataset(name)
        return answer(status)

    async def _files(self, request: web.Request) -> web.Response:
        return answer(await asyncio.to_thread(files_to_fetch, self._folder, request.match_info["name"]))

    async def _file(self, request: web.Request) -> web.StreamResponse:
        asked = request.match_info
        return file(await asyncio.to_thread(file_to_fetch, self._folder, asked["name"], asked["path"]))

    async def _status(self, name: str, row: Row | None) -> DatasetStatus:
        """Raises `NotFound` when there is neither a folder nor a request that is to make it."""
        found = await asyncio.to_thread(describe, self._folder, name)
        if row is None:
            if found is None:
                raise absent(self._folder, name)
            return found
        status = found or DatasetStatus(name=name, path=str(dataset_folder(self._folder, name)), complete=False)
        return msgspec.structs.replace(status, request=self._views.status_of(row))


def _remove(folder: Path) -> None:
    """First out of sight in one step, so that nobody takes a part for the whole."""
    if folder.is_dir():
        doomed = folder.rename(folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.removing"))
        shutil.rmtree(doomed)
