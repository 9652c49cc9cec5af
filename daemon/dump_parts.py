"""Dumps that several replicas write together: who has which slice, and which idle replica is to help with which dump.

A dump is a request that one worker has, as any other. Replicas of its pool that have nothing else to do are given *parts* of
it: a lease of the same bytes that owns nothing but the slices that it asks for, one after another. A part that ends, however
it does, gives back the slice that it has begun; nothing of that touches the request, and none of this is stored: the slices
are on disk, and after a daemon's end workers say what is written (`open`) and what they have begun (`hear`).

Replicas are shared out among users as the queue is: who has had least is helped next. What a replica that writes will cost
is not known, so it counts as a turn (`Scheduler.dues`). A replica that helps goes over to another user's dump at the end of
a slice, where its own user would still have had more without it than the other one with it: so no work is lost, and it does
not come back at once. What is lost is the time in which it makes the other corpus ready, so it has to have written for some
times as long before (`_WORTH`).
"""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING

import msgspec

from nnsight_hpc.daemon import attempts, table
from nnsight_hpc.daemon.records import SPARE
from nnsight_hpc.storage.slice_queue import SliceQueue
from nnsight_hpc.wire.errors import Conflict
from nnsight_hpc.wire.names import dump_of, part_id
from nnsight_hpc.wire.states import RequestState
from nnsight_hpc.wire.workers import SliceGiven

if TYPE_CHECKING:
    from nnsight_hpc.daemon.changes import Changes
    from nnsight_hpc.daemon.holdings import Held, Holdings
    from nnsight_hpc.daemon.request_files import RequestFiles
    from nnsight_hpc.daemon.roster import Roster
    from nnsight_hpc.daemon.scheduler import Scheduler
    from nnsight_hpc.daemon.store import Store
    from nnsight_hpc.daemon.table import Row
    from nnsight_hpc.wire.messages import DumpProgress
    from nnsight_hpc.wire.workers import Lease, SliceAsk, SliceProgress, SlicesOpened

PART = "part"
"""The kind of such a lease."""
_WORTH = 10
"""A replica that helps goes over to another dump after so many times the seconds that it took to begin with this one."""


class _Dump:
    """A dump of which a worker has said what is written.

    `helping` are the replicas that have a part of it or go over to it, with the seconds that each took to begin; `failed`
    are those on which none could be run.
    """

    def __init__(self, row: Row, queue: SliceQueue) -> None:
        self.row, self.queue = row, queue
        self.helping, self.failed = dict[str, float](), set[str]()


class DumpParts:
    """The slices of all dumps that run, and their parts."""

    def __init__(
        self,
        store: Store,
        changes: Changes,
        roster: Roster,
        holdings: Holdings,
        *,
        scheduler: Scheduler,
        files: RequestFiles,
    ) -> None:
        self._store, self._changes, self._roster = store, changes, roster
        self._holdings, self._scheduler, self._files = holdings, scheduler, files
        self._dumps: dict[str, _Dump] = {}

    # -- for workers ---------------------------------------------------------------------------------------------

    async def open(self, lease: str, replica: str, opened: SlicesOpened) -> None:
        """A worker that holds a dump, or a part of it, has looked at what is written. Raises `Conflict` for others."""
        held, row = await self._held(lease, replica), await self._row(lease)
        if row.state.ended:
            raise Conflict(f"dump {row.id} has ended", why=f"it is {row.state}")
        if row.id in self._dumps:
            self._dumps[row.id].queue.open(opened)
        else:
            self._dumps[row.id] = _Dump(row, SliceQueue(opened))
        if held.kind == PART:
            self._dumps[row.id].helping[replica] = time.time() - held.since
        self.note(await self._row(lease))  # it may have ended meanwhile
        self._wake(row)

    async def hear(self, lease: str, replica: str, progress: SliceProgress) -> None:
        """A worker says how far it is with a slice. Raises `Conflict` where it is not to write that dump."""
        await self._held(lease, replica)
        if dump := self._dumps.get(dump_of(lease)):
            dump.queue.report(replica, progress)
            self._changes.announce(f"request:{dump.row.id}")

    async def next(self, lease: str, replica: str, ask: SliceAsk) -> SliceGiven:
        """What a worker is to write next; asked again it says the same. Raises `Conflict` as `hear` does."""
        held, dump = await self._held(lease, replica), self._dumps.get(dump_of(lease))
        if dump is None:
            return SliceGiven(known=False)
        if ask.written is not None:
            dump.queue.wrote(ask.written)
        if dump.queue.complete:
            self._wake(dump.row)
            overflows, padding = dict(dump.queue.overflows), dump.queue.padding
            return SliceGiven(complete=True, leave=held.kind == PART, overflows=overflows, padding=padding)
        if held.kind == PART and self._is_wanted_elsewhere(held):
            return SliceGiven(leave=True)
        if held.kind == PART and ask.written is not None and (other := self._next_for(held, dump)):
            dump.helping.pop(replica, None)
            other.helping[replica] = 0.0  # at once: those who ask in the same moment are not to go over, too
            return SliceGiven(leave=True)
        number = dump.queue.next(replica, ask.begun)
        return SliceGiven(slice=number, leave=number is None and held.kind == PART)

    def lease(self, pool: str, replica: str, result_bytes: int | None) -> Lease | None:
        """A part of the dump that is to have the help of this replica, for which nothing else waits; None: of no dump."""
        dump = self._to_help(pool, replica)
        if dump is None:
            return None
        part = _part(dump.row, replica)
        dump.helping[replica] = 0.0
        self._holdings.take(part)
        lease = attempts.lease_of(attempts.Given(dump.row, b""), self._files, result_bytes)
        return msgspec.structs.replace(lease, id=part.id, kind=PART, attempt=part.attempt)

    # -- for the queue -------------------------------------------------------------------------------------------

    def note(self, row: Row) -> None:
        """A dump has another state, or was paused: its parts end with it."""
        if (dump := self._dumps.get(row.id)) is None:
            return
        dump.row = row
        for replica in dump.helping:
            if part := self._holdings.find(part_id(row.id, replica)):
                part.cancel, part.pause = row.state.ended, row.paused
                self._changes.announce(f"orders:{replica}")
        if row.state.ended:
            del self._dumps[row.id]

    def let_go(self, held: Held) -> None:
        """A worker holds a dump, or a part of one, no more: others may write what it had begun."""
        if dump := self._dumps.get(dump_of(held.id)):
            dump.helping.pop(held.replica, None)
            dump.queue.give_back(held.replica)
            self._wake(dump.row)

    def failed(self, part: Held) -> None:
        """A part could not be run. What is wrong with the dump itself its own worker finds out, and says."""
        if dump := self._dumps.get(dump_of(part.id)):
            dump.failed.add(part.replica)

    def lost(self, replica: str) -> list[Held]:
        """The parts that a replica was given, which asks for work: it has never heard of them, or left without a word.

        It is given none of these dumps again.
        """
        parts = []
        for name, dump in self._dumps.items():
            dump.helping.pop(replica, None)
            if part := self._holdings.find(part_id(name, replica)):
                self.failed(part)
                parts.append(part)
        return parts

    # -- what people see -----------------------------------------------------------------------------------------

    def progress(self, request: str) -> DumpProgress | None:
        """How far a dump is; None where no worker has said that lately."""
        return self._dumps[request].queue.progress() if request in self._dumps else None

    def queue(self, request: str) -> SliceQueue | None:
        return self._dumps[request].queue if request in self._dumps else None

    # -- inside --------------------------------------------------------------------------------------------------

    async def _held(self, lease: str, replica: str) -> Held:
        """What the replica holds under that name; a part of which this daemon has not heard is taken up."""
        held = self._holdings.named(lease, replica)
        if held is None and lease == part_id(dump_of(lease), replica):
            row = await self._row(lease)
            if not row.state.ended:
                self._holdings.take(_part(row, replica))
                held = self._holdings.named(lease, replica)
        if held is None:
            raise Conflict(f"replica {replica} is not to write {lease}")
        return held

    async def _row(self, lease: str) -> Row:
        return await self._store.run(lambda c: table.get(c, dump_of(lease)))

    def _to_help(self, pool: str, replica: str) -> _Dump | None:
        """The oldest dump with slices that wait, of the user who is to have the next replica."""
        if self._roster.left(replica) <= SPARE:
            return None
        dues = self._scheduler.dues(pool, self._writing(pool, replica))
        needy = [dump for dump in self._of_pool(pool) if self._needs(dump, replica)]
        able = [dump for dump in needy if not self._scheduler.is_barred(dump.row.user)]
        return min(able, key=lambda dump: (dues[dump.row.user], dump.row.sequence), default=None)

    def _next_for(self, part: Held, dump: _Dump) -> _Dump | None:
        """Another user's dump that the part's replica is to help with from now on; None: it is to go on with this one."""
        pool, user, replica = part.pool, part.user, part.replica
        began = dump.helping.get(replica, 0.0)
        if time.time() - part.since < (1 + _WORTH) * began or all(one.row.user == user for one in self._of_pool(pool)):
            return None
        other = self._to_help(pool, replica)
        if other is None or other.row.user == user:
            return None
        writing = self._writing(pool, replica)
        writing[other.row.user] += 1
        dues = self._scheduler.dues(pool, writing)
        return other if dues[user] > dues[other.row.user] else None

    def _writing(self, pool: str, replica: str) -> Counter[str]:
        """How many replicas write for each user who has a dump in the pool, beside this one."""
        others = {one.id for one in self._roster.replicas(pool) if one.serves and one.id != replica}
        writing: Counter[str] = Counter()
        for dump in self._of_pool(pool):
            own = self._holdings.find(dump.row.id)
            writers = {*dump.helping, own.replica} if own else {*dump.helping}
            writing[dump.row.user] += len(writers & others)
        return writing

    def _of_pool(self, pool: str) -> list[_Dump]:
        return [dump for dump in self._dumps.values() if dump.row.pool == pool]

    def _needs(self, dump: _Dump, replica: str) -> bool:
        own = self._holdings.find(dump.row.id)
        stopped = dump.row.paused or (own is not None and own.cancel)
        return dump.queue.waiting > 0 and replica not in dump.failed and not stopped

    def _is_wanted_elsewhere(self, part: Held) -> bool:
        """Whether this replica is the one that is to run what waits, or it is to end."""
        replica = self._roster.remembered(part.replica)
        if replica is None or self._roster.is_leaving(replica):
            return True
        return part.id in self._scheduler.gives_way(part.replica)

    def _wake(self, dump: Row) -> None:
        """There may be slices for those who wait: idle replicas, and the dump's own worker."""
        self._changes.announce(f"queue:{dump.pool}")
        if own := self._holdings.find(dump.id):
            self._changes.announce(f"orders:{own.replica}")


def _part(dump: Row, replica: str) -> Row:
    """A part of a dump as the row that it would have."""
    return msgspec.structs.replace(
        dump,
        id=part_id(dump.id, replica),
        kind=PART,
        replica=replica,
        attempt=1,
        cancel=False,
        state=RequestState.LEASED,
        times={RequestState.LEASED: time.time()},
    )
