"""Finds what belongs to nobody: jobs of ours, by what the batch system itself knows of them, folders of replicas, datasets."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from itertools import groupby
from typing import TYPE_CHECKING

from nnsight_hpc.storage.leftovers import left_in
from nnsight_hpc.wire.errors import Unreachable
from nnsight_hpc.wire.files import read_if_there
from nnsight_hpc.wire.messages import decode
from nnsight_hpc.wire.pools import Garbage, PoolSpec

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping
    from pathlib import Path

    from nnsight_hpc.daemon.parts import Parts

logger = logging.getLogger(__name__)

_OLD = 7 * 86400.0
"""Folders that have changed within so many seconds stay."""
_KEPT = 20
"""So many of the newest ended replicas of a pool keep their logs."""


class Collector:
    """Asks the batch system, once each time, which jobs of this home there are."""

    def __init__(self, parts: Parts) -> None:
        self._pools, self._executor, self._views = parts.pools, parts.executor, parts.views
        self._places, self._lingering = parts.config.places, parts.config.lingering

    async def end_strays(self) -> Garbage:
        """Cancel every job of ours that no replica has; those of replicas are for the reconciler to end."""
        strays = await self._strays(await self._ours())
        await self._cancel(strays.values())
        return Garbage(jobs=tuple(strays.values()))

    async def collect(self, *, dry: bool) -> Garbage:
        """Cancel jobs that belong to no pool, and remove folders and datasets that nobody needs; `dry`: only say which."""
        ours = await self._ours()
        strays = await self._strays(ours)
        jobs = [job for replica, job in strays.items() if not await asyncio.to_thread(self._is_wanted, replica)]
        folders = await asyncio.to_thread(_useless, self._places.replicas, {*self._live(), *ours})
        folders += await asyncio.to_thread(left_in, self._places.datasets, await self._views.datasets())
        if not dry:
            await self._cancel(jobs)
            for folder in folders:
                await asyncio.to_thread(shutil.rmtree, folder)
        return Garbage(jobs=tuple(jobs), folders=tuple(map(str, folders)))

    def _live(self) -> set[str]:
        return {replica.id for replica in self._pools.replicas()}

    async def _ours(self) -> dict[str, str]:
        """The jobs of this home that have not ended, by replica."""
        survey = await asyncio.to_thread(self._executor.survey, [], self._places)
        if survey.doubt:
            raise Unreachable(
                "which jobs are ours cannot be said just now, and so none was cancelled",
                why=survey.doubt,
                next="try again in a minute",
            )
        return survey.ours

    async def _strays(self, ours: Mapping[str, str]) -> dict[str, str]:
        """Those that no replica has; one that has written down why it ends, a moment ago, ends by itself."""
        unknown = ours.keys() - self._live()
        return {replica: ours[replica] for replica in unknown if not await asyncio.to_thread(self._ends, replica)}

    def _ends(self, replica: str) -> bool:
        try:
            written = (self._places.replica(replica) / "end.json").stat().st_mtime
        except FileNotFoundError:
            return False
        return time.time() - written < self._lingering

    def _is_wanted(self, replica: str) -> bool:
        """Whether its worker will be taken up when it dials: somebody has submitted a plan, of no pool that goes down."""
        data = read_if_there(self._places.replica(replica) / "job.json")
        pool = self._pools.find(decode(data, PoolSpec).name) if data else None
        return data is not None and not (pool and pool.down)

    async def _cancel(self, jobs: Iterable[str]) -> None:
        for job in jobs:
            logger.info("job %s belongs to no pool: it is cancelled", job)
            await asyncio.to_thread(self._executor.cancel, job)


def _useless(replicas: Path, needed: Collection[str]) -> list[Path]:
    """Old folders of replicas: plans that were never used, and ended ones beyond the newest of each pool."""
    folders = [folder for folder in replicas.iterdir() if folder.is_dir() and folder.name not in needed]
    plans = [folder for folder in folders if not (folder / "log").exists()]
    ended = sorted((folder for folder in folders if folder not in plans), key=lambda f: (_pool_of(f), -_changed(f)))
    surplus = [folder for _, group in groupby(ended, key=_pool_of) for folder in list(group)[_KEPT:]]
    return [folder for folder in (*plans, *surplus) if time.time() - _changed(folder) > _OLD]


def _pool_of(folder: Path) -> str:
    """The ids of replicas are those of their pools with a hyphen and digits."""
    return folder.name.rpartition("-")[0]


def _changed(folder: Path) -> float:
    return folder.stat().st_mtime
