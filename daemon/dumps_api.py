"""The HTTP interface for dumps beyond that of their requests: how far they are, paused, checked and mended."""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING

from aiohttp import web

from nnsight_hpc.daemon.backlog import HELD
from nnsight_hpc.daemon.checkups import Checkups
from nnsight_hpc.daemon.new_request import NewRequest
from nnsight_hpc.daemon.sharing import may_see
from nnsight_hpc.daemon.web import LAST_BYTE, LONGEST_WAIT, answer, number, required
from nnsight_hpc.storage import dataset_folder, read_attributes, repair
from nnsight_hpc.storage.manifest import written_slices
from nnsight_hpc.wire.dumps import DumpStatus, SliceDoing
from nnsight_hpc.wire.errors import Conflict, HpcError, NotFound
from nnsight_hpc.wire.names import new_request_id

if TYPE_CHECKING:
    from pathlib import Path

    from nnsight_hpc.daemon.parts import Parts
    from nnsight_hpc.daemon.table import Row


class DumpsApi:
    def __init__(self, parts: Parts) -> None:
        self._pools, self._requests, self._views = parts.pools, parts.requests, parts.views
        self._folder, self._checkups = parts.config.places.datasets, Checkups(parts.changes)

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v1/dumps", self._list),
            web.get("/v1/dumps/{name}", self._get),
            web.post("/v1/dumps/{name}/pause", self._pause),
            web.post("/v1/dumps/{name}/resume", self._resume),
            web.post("/v1/dumps/{name}/verify", self._verify),
            web.post("/v1/dumps/{name}/repair", self._repair),
        ]

    async def _list(self, request: web.Request) -> web.Response:
        rows = (await self._views.datasets()).values()
        mine = sorted((row for row in rows if may_see(request, row.user)), key=lambda row: row.sequence)
        return answer([await self._status(row) for row in mine])

    async def _get(self, request: web.Request) -> web.Response:
        return answer(await self._status(await self._row(request)))

    async def _pause(self, request: web.Request) -> web.Response:
        row = await self._row(request)
        return answer(await self._status(await self._requests.pause(row.id, paused=True)))

    async def _resume(self, request: web.Request) -> web.Response:
        row = await self._row(request)
        return answer(await self._status(await self._requests.pause(row.id, paused=False)))

    async def _verify(self, request: web.Request) -> web.Response:
        """Begin a check, or go on waiting for it."""
        wait, seen = (
            number(request, name, default=0, most=most) for name, most in (("wait", LONGEST_WAIT), ("seen", LAST_BYTE))
        )
        folder = dataset_folder(self._folder, request.match_info["name"])
        return answer(await self._checkups.look(folder, required(request, "check"), int(seen), wait))

    async def _repair(self, request: web.Request) -> web.Response:
        """Have what a check has found damaged, and what is missing, written again."""
        row, folder = await self._row(request), dataset_folder(self._folder, request.match_info["name"])
        if not row.state.ended:
            raise Conflict(
                f"dataset {row.dataset} is being written", where=f"request {row.id}", next=f"cancel {row.id} first"
            )
        damage = self._checkups.found(folder, required(request, "check"))
        status = await self._status(row)
        if status.complete and not damage:
            return answer(status)
        self._pools.accepting(row.pool)
        kept = self._requests.files.request(row.id)
        if not await asyncio.to_thread(kept.exists):
            raise _not_kept(row, folder)
        await asyncio.to_thread(repair, folder, damage)
        again = NewRequest(
            id=new_request_id(),
            kind="dump",
            pool=row.pool,
            user=row.user,
            received=time.time(),
            fingerprint=row.fingerprint,
            dump=row.dump,
            digest=row.digest,
        )
        frame = self._requests.files.request(again.id)
        await asyncio.to_thread(os.link, kept, frame)
        try:
            accepted = await self._requests.accept(again)
        except (Conflict, NotFound):
            frame.unlink()
            raise
        return answer(await self._status(await accepted.durable))

    async def _row(self, request: web.Request) -> Row:
        name = request.match_info["name"]
        row = await self._views.dataset(name)
        if row is None:
            raise NotFound(f"no dump of the name {name} is known", next="`nnsight-hpc dumps` lists them")
        return row

    async def _status(self, row: Row) -> DumpStatus:
        folder, queue = dataset_folder(self._folder, row.dataset), self._requests.dumps.queue(row.id)
        complete, slices, written = await asyncio.to_thread(_on_disk, folder)
        doing = queue.doing() if queue else {}
        return DumpStatus(
            name=row.dataset,
            path=str(folder),
            complete=complete,
            request=self._views.status_of(row),
            slices=slices,
            written=queue.written if queue else written,
            leads=row.replica if row.state in HELD else "",
            doing=tuple(
                SliceDoing(replica=replica, slice=one.slice, tokens=one.tokens, speed=one.speed)
                for replica, one in sorted(doing.items())
            ),
        )


def _on_disk(folder: Path) -> tuple[bool, int, int]:
    """Whether a dataset is complete, how many slices it has, and how many of them are written."""
    try:
        attributes = read_attributes(folder)
    except HpcError:  # there is none yet
        return False, 0, 0
    written = attributes.slices if attributes.complete else len(written_slices(folder))
    return attributes.complete, attributes.slices, written


def _not_kept(row: Row, folder: Path) -> NotFound:
    command = row.dump.command if row.dump else ""
    return NotFound(
        f"what was asked for dataset {row.dataset} is not kept any more",
        where=f"request {row.id}",
        why="requests that ended long ago are forgotten",
        next=f"remove {folder}, and dump it again" + (f": {command}" if command else ""),
    )
