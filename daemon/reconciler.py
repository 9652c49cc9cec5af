"""Makes the pools what they are wanted to be: looks at what is known, decides, and carries it out.

One task does it, in turns; what is to be done is decided by `decisions.decide`, and what the executor is asked for lies
in `jobs`. Here is what the steps mean for the pools, their replicas and their requests.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from typing import TYPE_CHECKING, assert_never

from nnsight_hpc.daemon.decisions import decide
from nnsight_hpc.daemon.health import cause_of, is_failed_start, unserved, why_ended
from nnsight_hpc.daemon.jobs import Jobs
from nnsight_hpc.daemon.logs import last_lines
from nnsight_hpc.daemon.records import UNREGISTERED
from nnsight_hpc.daemon.steps import Cancel, Lose, Release, Submit
from nnsight_hpc.wire.errors import HpcError, InvalidInput, NotFound, ReplicaFailed
from nnsight_hpc.wire.files import read_if_there
from nnsight_hpc.wire.messages import decode
from nnsight_hpc.wire.states import EndCause, ReplicaState
from nnsight_hpc.wire.workers import EndRecord

if TYPE_CHECKING:
    from pathlib import Path

    from nnsight_hpc.daemon.config import Config
    from nnsight_hpc.daemon.pools import Pools
    from nnsight_hpc.daemon.records import Pool, Replica
    from nnsight_hpc.daemon.requests import Requests
    from nnsight_hpc.daemon.steps import Step
    from nnsight_hpc.slurm.batch.executor import Executor

logger = logging.getLogger(__name__)

_R = ReplicaState
_AFTER_ERROR = 5.0
_LOG_LINES = 20
_REFUSALS = 6
"""So often in a row a job is submitted again that is refused where one is allowed at a time: for about two minutes."""


class Reconciler:
    """The task that acts on the pools."""

    def __init__(self, pools: Pools, requests: Requests, executor: Executor, config: Config) -> None:
        self._pools, self._requests, self._config = pools, requests, config
        self._jobs = Jobs(pools, executor, config, self._finish, self._refused)
        self._knock = asyncio.Event()
        self._turned = time.time()
        self._retry_at: dict[str, float] = {}
        self._ending: dict[str, str] = {}  # replicas whose end is being written down, and their pools

    def look_soon(self) -> None:
        """Somebody wants to know what has become of the jobs."""
        self._jobs.look_soon()
        self._knock.set()

    def try_now(self, pool: str) -> None:
        """Somebody asked for this pool: submit what is missing without waiting after earlier failures."""
        self._retry_at.pop(pool, None)
        self._jobs.ask(pool)
        self._knock.set()

    async def ended(self, replica: str, cause: EndCause, reason: str) -> None:
        """A worker has said that it ends. One that was signalled cannot know why: the batch system will say it."""
        try:
            known = self._pools.replica(replica)
        except NotFound:
            return
        if cause != EndCause.CANCELLED or known.drain:
            await self._finish(replica, None, "", EndRecord(replica=replica, cause=cause, detail=reason))
            return
        why = reason or "it was told to end by a signal"
        state = known.state if known.state in UNREGISTERED else _R.DRAINING
        await self._pools.change(known, state=state, reason=why)
        await self._requests.take_back(self._requests.held_by(replica), f"replica {replica}: {why}", cause)
        self._knock.set()

    async def run(self) -> None:
        try:
            while True:
                self._knock.clear()
                await self._turn_if_possible()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._knock.wait(), self._config.look if self._pools.names() else None)
        finally:
            self._jobs.stop()

    async def _turn_if_possible(self) -> None:
        try:
            await self._turn()
        except Exception:  # a full disk, a lost lease: the next turn may do better
            logger.exception("the pools could not be looked after; trying again")
            await asyncio.sleep(_AFTER_ERROR)

    async def _turn(self) -> None:
        now = time.time()
        if self._pools.names() and now - self._turned > self._config.lost / 2:
            self._pools.hear_all()  # this process was stopped, or had no pools
        self._turned = now
        for pool in self._pools.all():
            await self._act(pool)
        self._jobs.look_if_due()

    # -- what is to be done --------------------------------------------------------------------------------------

    async def _act(self, pool: Pool) -> None:
        name, replicas = pool.spec.name, self._pools.replicas(pool.spec.name)
        if pool.down and not replicas:
            await self._pools.forget(name)
            self._retry_at.pop(name, None)
            return
        demand, heard = self._requests.demand(name), self._pools.heard
        decision = decide(pool, replicas, demand, heard, now=time.time(), config=self._config)
        if decision.desired != pool.desired:
            await self._pools.change_pool(name, desired=decision.desired)
            self._pools.tell(name, f"{decision.desired} replicas instead of {pool.desired}: {decision.because}")
        for step in decision.steps:
            with suppress(NotFound):  # it has ended since
                await self._take(step, pool)

    async def _take(self, step: Step, pool: Pool) -> None:
        match step:
            case Submit():
                await self._submit(step, pool)
            case Release():
                await self._release(step)
            case Cancel():
                await self._pools.change(step.replica, until=time.time() + self._config.drain)
                self._jobs.cancel(step.replica)
            case Lose():
                self._jobs.cancel(step.replica)
                await self._finish(step.replica.id, EndCause.LOST, step.reason)
            case _:
                assert_never(step)

    async def _submit(self, step: Submit, pool: Pool) -> None:
        if pool.spec.name in self._ending.values():  # whether it is tried again at once is not decided yet
            return
        if self._retry_at.get(pool.spec.name, 0.0) > time.monotonic():
            return
        self._jobs.submit(await self._pools.new_replica(pool.spec, succeeds=step.succeeds, begin=step.begin))

    async def _release(self, step: Release) -> None:
        """Let a worker finish what it holds, and end its job when it takes too long; one that serves nobody ends now."""
        until = time.time() + self._config.drain if step.hurry else None
        told = {"drain": True, "told": step.cause, "until": until, "reason": step.reason}
        if step.replica.state in (*UNREGISTERED, _R.LOADING):
            self._jobs.cancel(await self._pools.change(step.replica, **told))
        else:
            self._jobs.drain(await self._pools.change(step.replica, state=_R.DRAINING, **told))

    # -- what has ended ------------------------------------------------------------------------------------------

    async def _finish(self, name: str, said: EndCause | None, words: str, record: EndRecord | None = None) -> None:
        """A replica's job has ended: its requests go back to the queue, and its pool may be held.

        Parameters
        ----------
        said, words
            What we know of its end, or the batch system.
        record
            What its worker has said, if that is how we know.
        """
        if name in self._ending:
            return
        with suppress(NotFound):  # it had ended before
            old = self._pools.replica(name)
            self._ending[name] = old.spec.name
            try:
                await self._end(old, said, words, record)
            finally:
                del self._ending[name]
        self._knock.set()

    async def _end(self, old: Replica, said: EndCause | None, words: str, record: EndRecord | None) -> None:
        folder = self._config.places.replica(old.id)
        record = record or await asyncio.to_thread(_own_words, folder / "end.json")
        cause = cause_of(old.told, record, said)
        tail = "" if cause.expected else await asyncio.to_thread(last_lines, folder / "log", _LOG_LINES)
        (folder / "job.json").unlink(missing_ok=True)  # nobody is to take it up again
        reason = why_ended(old, cause, record, words)
        about = {"replica": old.id, "job": old.status.job_id, "pool": old.spec.name}
        logger.info("replica %s has ended (%s): %s", old.id, cause, reason, extra=about)
        new = await self._pools.change(old, state=_R.ENDED, cause=cause, reason=reason, tail=tail)
        name = old.spec.name
        if is_failed_start(old, cause):
            await self._count_failure(name, new)
        in_a_row = unserved(self._pools.of(name))
        pause = min(self._config.retry * 2 ** min(max(0, in_a_row - 1), 16), self._config.retry_most)
        self._retry_at[name] = time.monotonic() + pause
        await self._requests.take_back(self._requests.held_by(old.id), f"replica {old.id} ended: {reason}", cause)
        await self._requests.hopeless.fail([name])

    async def _count_failure(self, name: str, replica: Replica) -> None:
        pool = self._pools.find(name)
        if pool is None or pool.held:
            return
        pool = await self._pools.change_pool(name, failures=pool.failures + 1)
        if pool.failures >= self._config.starts:
            await self._hold(name, _replica_failed(pool, replica))

    async def _refused(self, replica: Replica, error: InvalidInput) -> None:
        """The batch system will never take such a job. Where it has refused a successor, it may take one job at a time."""
        name = replica.spec.name
        pool = self._pools.find(name)
        if pool is None:
            return
        if replica.status.succeeds:
            await self._pools.change_pool(name, gap=error.why or error.what)
            self._pools.tell(name, f"a successor was refused, so there is one job at a time from now on: {error.what}")
        elif pool.overlaps or not self._may_be_early(name):
            await self._hold(name, error)

    def _may_be_early(self, name: str) -> bool:
        """Where one job is allowed at a time, the former one leaves the queue somewhat after its worker has ended."""
        replicas = self._pools.of(name)
        return any(replica.served for replica in replicas) and unserved(replicas) <= _REFUSALS

    async def _hold(self, name: str, error: HpcError) -> None:
        """Start no more replicas of it, and fail what waits for it unless there is another replica."""
        logger.error("%s", error)
        await self._pools.change_pool(name, held=error.report())
        self._pools.tell(name, f"held: {error.what}")
        await self._requests.hopeless.fail([name])


def _replica_failed(pool: Pool, replica: Replica) -> ReplicaFailed:
    """Why a pool is held: how its last replica ended, and the end of its log."""
    status, name = replica.status, pool.spec.name
    lines = f"\nthe last lines of its log:\n{status.tail}" if status.tail else "\nit wrote nothing to its log"
    return ReplicaFailed(
        f"pool {name} is held: its replicas ended {pool.failures} times in a row before one could serve",
        where=f"replica {replica.id}, job {status.job_id or '(none)'}, log {status.log}",
        why=f"{status.reason}{lines}",
        next=f"mend the cause, then `nnsight-hpc resume {name}`, or `nnsight-hpc up {name} …` with other settings",
    )


def _own_words(path: Path) -> EndRecord | None:
    """Why a worker ended, as it has written it down itself."""
    data = read_if_there(path)
    try:
        return decode(data, EndRecord) if data else None
    except InvalidInput:
        return None
