"""Checks of datasets where they lie: every checksum is computed again, in a thread, one check of a dataset at a time."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from nnsight_hpc.storage.damage import find_damage
from nnsight_hpc.wire.dumps import DamagedFile, DatasetCheck
from nnsight_hpc.wire.errors import Conflict

if TYPE_CHECKING:
    from pathlib import Path

    from nnsight_hpc.daemon.changes import Changes
    from nnsight_hpc.storage import Damage


class _Checkup:
    """One check. `id` is its asker's, so that asking again does not begin another one."""

    def __init__(self, id: str) -> None:
        self.id = id
        self.done = self.total = 0
        self.task: asyncio.Task[list[Damage]]


class Checkups:
    """The last check of each dataset, as long as the daemon lives."""

    def __init__(self, changes: Changes) -> None:
        self._changes = changes
        self._last: dict[str, _Checkup] = {}

    async def look(self, folder: Path, check: str, seen: int, seconds: float) -> DatasetCheck:
        """How far the check of that id is, which is begun where it is a new one: once more than `seen` bytes are read.

        Raises `Conflict` while another one runs, and as `find_damage` does.
        """
        checkup = self._checkup(folder, check)

        async def read() -> DatasetCheck:
            if not checkup.task.done():
                return DatasetCheck(done=checkup.done, total=checkup.total)
            damage = tuple(map(_damaged, checkup.task.result()))
            return DatasetCheck(done=checkup.total, total=checkup.total, over=True, damage=damage)

        key = f"check:{folder.name}"
        return await self._changes.wait(key, read, lambda found: found.over or found.done > seen, seconds)

    def found(self, folder: Path, check: str) -> list[Damage]:
        """What a check that is over has found. Raises `Conflict` where there is none, and as `find_damage` does."""
        last = self._last.get(folder.name)
        if last is None or last.id != check or not last.task.done():
            raise Conflict(f"dataset {folder.stem} was not checked", where=str(folder), next="check it first")
        return last.task.result()

    def _checkup(self, folder: Path, check: str) -> _Checkup:
        last = self._last.get(folder.name)
        if last is not None and last.id == check:
            return last
        if last is not None and not last.task.done():
            raise Conflict(
                f"dataset {folder.stem} is being checked already", where=str(folder), next="wait until it is"
            )
        checkup, loop = _Checkup(check), asyncio.get_running_loop()

        def note(done: int, total: int) -> None:
            checkup.done, checkup.total = done, total
            loop.call_soon_threadsafe(self._changes.announce, f"check:{folder.name}")

        checkup.task = asyncio.create_task(asyncio.to_thread(find_damage, folder, note))
        checkup.task.add_done_callback(lambda _: self._changes.announce(f"check:{folder.name}"))
        self._last[folder.name] = checkup
        return checkup


def _damaged(one: Damage) -> DamagedFile:
    return DamagedFile(path=one.path, problem=one.problem, slices=one.slices, rows=one.rows, documents=one.documents)
