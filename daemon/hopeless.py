"""Requests that wait, and of which it turns out that they will never run: they fail at once, and say why."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nnsight_hpc.daemon import table
from nnsight_hpc.daemon.given_up import refuse
from nnsight_hpc.daemon.refusals import fingerprint_error, needs_error

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Iterable

    from nnsight_hpc.daemon.pools import Pools
    from nnsight_hpc.daemon.store import Store
    from nnsight_hpc.daemon.table import Row
    from nnsight_hpc.wire.errors import HpcError
    from nnsight_hpc.wire.messages import ModelIdentity


class Hopeless:
    """Fails what waits in vain.

    Parameters
    ----------
    moved
        Hears of each request that has failed so, once that is on disk.
    """

    def __init__(self, store: Store, pools: Pools, moved: Callable[[Row], None]) -> None:
        self._store, self._pools, self._moved = store, pools, moved

    async def fail(self, pools: Iterable[str]) -> None:
        """Fail all that waits for one of these pools, if no replica of it will ever take it."""
        for pool in pools:
            if refusal := self._pools.refusal(pool):
                await self._fail(pool, lambda _, refusal=refusal: refusal)  # type: ignore[misc]  # mypy knows no such default

    async def fail_other_models(self, pool: str, model: ModelIdentity) -> None:
        """Fail what waits for `pool` and was made for another model than the one that it turned out to hold."""
        await self._fail(pool, lambda row: fingerprint_error(pool, model, row.fingerprint))

    async def fail_too_long(self, pool: str) -> None:
        """Fail what waits for `pool` and needs more than a replica can give, now that a replica has loaded."""
        longest = self._pools.longest(pool)
        await self._fail(pool, lambda row: needs_error(pool, row.needs, longest))

    async def _fail(self, pool: str, reason: Callable[[Row], HpcError | None]) -> None:
        def fail(connection: sqlite3.Connection) -> list[Row]:
            waiting = [(row, reason(row)) for row in table.select(connection, "state = 'QUEUED' AND pool = ?", pool)]
            return [refuse(connection, row, error) for row, error in waiting if error]

        for row in await self._store.run(fail):
            self._moved(row)
