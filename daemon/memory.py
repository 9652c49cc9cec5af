"""What is known of requests in memory, beside SQLite, and how it follows each change of their rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nnsight_hpc.daemon.backlog import HELD, Backlog
from nnsight_hpc.daemon.counters import Counters
from nnsight_hpc.daemon.dump_parts import DumpParts
from nnsight_hpc.daemon.holdings import Holdings
from nnsight_hpc.daemon.quota import Quota
from nnsight_hpc.daemon.scheduler import Scheduler
from nnsight_hpc.wire.states import RequestState

if TYPE_CHECKING:
    from collections.abc import Iterable

    from nnsight_hpc.daemon.changes import Changes
    from nnsight_hpc.daemon.config import Config
    from nnsight_hpc.daemon.holdings import Held
    from nnsight_hpc.daemon.pools import Pools
    from nnsight_hpc.daemon.request_files import RequestFiles
    from nnsight_hpc.daemon.store import Store
    from nnsight_hpc.daemon.table import Row


class Memory:
    """What waits and how much of it, who holds what, and what has been counted; it wakes those who wait for a change."""

    def __init__(self, store: Store, changes: Changes, pools: Pools, config: Config, files: RequestFiles) -> None:
        self._changes, self._files = changes, files
        self.backlog, self.quota = Backlog(), Quota(config.queued_per_user)
        self.holdings, self.counters = Holdings(), Counters()
        self.scheduler = Scheduler(self.backlog, self.holdings, pools, config)
        self.dumps = DumpParts(store, changes, pools, self.holdings, scheduler=self.scheduler, files=files)

    def load(self, rows: Iterable[Row]) -> None:
        """All that has not ended, after a start."""
        for row in rows:
            self._note(row)
            if row.state in HELD:
                self.holdings.take(row)

    def moved(self, row: Row) -> None:
        """It is on disk that a request has another state."""
        self.announce(row)
        self.clear(row)

    def announce(self, row: Row) -> None:
        """A request has another state: count it there, wake who waits."""
        self._note(row)
        self.dumps.note(row)
        self._changes.announce(f"request:{row.id}")
        if row.state == RequestState.QUEUED:
            self._changes.announce(f"queue:{row.pool}")
            for replica in self.holdings.dumping(row.pool):
                self._changes.announce(f"orders:{replica}")
        if row.state not in HELD:
            self.let_go(row.id)
        if row.state.ended:
            self._changes.announce(f"news:{row.id}")

    def clear(self, row: Row) -> None:
        """Remove what nobody needs of an ended request."""
        if row.state.ended:
            self._files.remove_of_ended(row)

    def let_go(self, request: str) -> Held | None:
        """No worker holds it (any more); its user may have another run, if he had as many as he may."""
        held = self.holdings.find(request)
        if held is not None and self.scheduler.is_barred(held.user):
            for pool in self.backlog.pools():
                self._changes.announce(f"queue:{pool}")
        if held is not None and held.is_dump:
            self.dumps.let_go(held)
        return self.holdings.drop(request)

    def go_back(self, request: str, row: Row | None) -> None:
        """What was done with it did not come to the disk, where it is as in `row`."""
        if row is None:
            self._give_up(request)
        else:
            self.moved(row)
            if row.state in HELD:
                self.holdings.take(row)
        self._changes.announce(f"news:{request}")

    def _give_up(self, request: str) -> None:
        """There is no such request; a worker that has it is told to stop."""
        self.backlog.forget(request)
        self.quota.forget(request)
        self.counters.forget(request)
        if held := self.holdings.find(request):
            held.cancel = True
            self._changes.announce(f"orders:{held.replica}")

    def _note(self, row: Row) -> None:
        self.backlog.note(row)
        self.quota.note(row)
        self.counters.note(row)
