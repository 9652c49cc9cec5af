"""Makes the pools what they are wanted to be: submits what is missing, drains what is too much, sees what has ended.

One task does all of it, in turns: what was learnt, then what is to be done, then sleep until something is due or somebody
knocks. The executor is asked about all jobs at once, in a thread, and seldom: workers tell the rest themselves.
"""

from __future__ import annotations

import asyncio
import logging
import random
import subprocess
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from nnsight_hpc.daemon.logs import last_lines
from nnsight_hpc.daemon.pools import UNREGISTERED, replica_failed, same_job
from nnsight_hpc.slurm.batch.executor import JobState
from nnsight_hpc.wire.errors import HpcError, InvalidInput, Unreachable
from nnsight_hpc.wire.files import read_if_there, write_atomically
from nnsight_hpc.wire.messages import EndRecord, decode, encode
from nnsight_hpc.wire.states import ReplicaState

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from nnsight_hpc.daemon.config import Config
    from nnsight_hpc.daemon.pools import Pool, Pools, Replica
    from nnsight_hpc.daemon.requests import Requests
    from nnsight_hpc.slurm.batch.executor import Executor, JobInfo

logger = logging.getLogger(__name__)

_R = ReplicaState
_AFTER_ERROR = 5.0
_LOG_LINES = 20
_FAILURES = (HpcError, OSError, subprocess.SubprocessError)
"""What an executor may raise: its own errors, and those of the programs that it runs."""


class Reconciler:
    """The task that acts on the pools; `knock` wakes it."""

    def __init__(self, pools: Pools, requests: Requests, executor: Executor, config: Config) -> None:
        self._pools, self._requests, self._executor, self._config = pools, requests, executor, config
        self._knock = asyncio.Event()
        self._query_at = 0.0
        self._retry_at: dict[str, float] = {}
        self._cancel_at: dict[str, float] = {}  # of replicas that drain

    def knock(self) -> None:
        """Something has changed: look at once."""
        self._knock.set()

    def ask_soon(self) -> None:
        """Something was begun or has ended: ask the executor in `Config.ask_after`, if it would be later otherwise."""
        self._query_at = min(self._query_at, time.monotonic() + self._config.ask_after)
        self._knock.set()

    def try_now(self, pool: str) -> None:
        """Somebody asked for this pool: submit what is missing without waiting after earlier failures."""
        self._retry_at.pop(pool, None)
        self._knock.set()

    async def run(self) -> None:
        await self._forget_half_submitted()
        while True:
            self._knock.clear()
            try:
                await self._turn()
            except Exception:  # a full disk, a lost lease: the next turn may do better
                logger.exception("the pools could not be looked after; trying again")
                await asyncio.sleep(_AFTER_ERROR)
            await self._sleep()

    async def _turn(self) -> None:
        await self._observe()
        for pool in self._pools.all():
            await self._act(pool)

    async def _sleep(self) -> None:
        due = [*self._retry_at.values(), *self._cancel_at.values()]
        if self._pools.replicas():
            due.append(self._query_at)
        with suppress(TimeoutError):
            await asyncio.wait_for(self._knock.wait(), max(0.0, min(due) - time.monotonic()) if due else None)

    # -- what has become of the jobs -----------------------------------------------------------------------------

    async def _forget_half_submitted(self) -> None:
        """A daemon was killed while it submitted these: should a job exist, its worker is told to end when it dials."""
        for replica in self._pools.replicas():
            if not replica.status.job_id:
                await self._finish(replica, "the daemon was ended while it submitted the job")

    async def _observe(self) -> None:
        replicas = [replica for replica in self._pools.replicas() if replica.status.job_id]
        if not replicas or time.monotonic() < self._query_at:
            return
        moving = any(replica.drain or replica.state in (*UNREGISTERED, _R.DRAINING) for replica in replicas)
        period = self._config.poll_moving if moving else self._config.poll_quiet
        self._query_at = time.monotonic() + random.uniform(*period)  # noqa: S311 - jitter
        try:
            jobs = await asyncio.to_thread(self._executor.query, [replica.status.job_id for replica in replicas])
        except _FAILURES as error:
            logger.warning("the executor could not say what becomes of its jobs: %s", error)
            return
        for replica in replicas:
            if info := jobs.get(replica.status.job_id):
                await self._learn(replica.id, info)

    async def _learn(self, replica_id: str, info: JobInfo) -> None:
        replica = next((r for r in self._pools.replicas() if r.id == replica_id), None)
        if replica is None or info.state == JobState.UNKNOWN:
            return
        if info.state == JobState.ENDED:
            await self._finish(replica, info.reason)
        elif info.state == JobState.PENDING and replica.state in UNREGISTERED:
            await self._pools.change(replica, state=_R.PENDING, reason=info.reason)
        elif info.state == JobState.RUNNING and replica.state in UNREGISTERED:
            await self._pools.change(replica, state=_R.STARTING, reason=info.reason, host=info.host, ends=info.ends)

    async def _finish(self, replica: Replica, reason: str) -> None:
        """A replica's job has ended: its requests go back to the queue, and its pool may be held."""
        folder = self._config.places.replica(replica.id)
        reason = replica.cause or _own_words(folder / "end.json") or reason
        replica = await self._end(replica, reason)
        self._cancel_at.pop(replica.id, None)
        if not (replica.served or replica.drain):
            await self._count_failure(replica)
        else:
            self._retry_at[replica.spec.name] = time.monotonic() + self._config.retry
        await self._requests.take_back(self._requests.held_by(replica.id), f"replica {replica.id} ended: {reason}")
        await self._requests.fail_hopeless(replica.spec.name)

    async def _end(self, replica: Replica, reason: str) -> Replica:
        logger.info("replica %s, job %s, has ended: %s", replica.id, replica.status.job_id or "(none)", reason)
        job = self._config.places.replica(replica.id) / "job.json"
        job.unlink(missing_ok=True)  # nobody is to take it up again
        return await self._pools.change(replica, state=_R.ENDED, reason=reason)

    async def _count_failure(self, replica: Replica) -> None:
        pool = self._pools.find(replica.spec.name)
        if pool is None or pool.held:
            return
        pool = await self._pools.change_pool(pool.spec.name, failures=pool.failures + 1)
        if pool.failures >= self._config.starts:
            log = await asyncio.to_thread(last_lines, self._config.places.replica(replica.id) / "log", _LOG_LINES)
            await self._hold(pool, replica_failed(pool, replica, log))
        self._retry_at[pool.spec.name] = time.monotonic() + self._config.retry * 2 ** (pool.failures - 1)

    async def _hold(self, pool: Pool, error: HpcError) -> None:
        """Start no more replicas of it, and fail what waits for it unless there is another replica."""
        logger.error("%s", error)
        await self._pools.change_pool(pool.spec.name, held=error.report())
        await self._requests.fail_hopeless(pool.spec.name)

    # -- what is to be done --------------------------------------------------------------------------------------

    async def _act(self, pool: Pool) -> None:
        replicas = self._pools.replicas(pool.spec.name)
        wanted = [r for r in replicas if not r.drain and same_job(r, pool)]
        wanted.sort(key=lambda replica: replica.state in (_R.READY, _R.BUSY))  # those that serve stay
        surplus = wanted[: max(0, len(wanted) - pool.desired)]
        for replica in replicas:
            if replica in surplus or replica not in wanted:
                await self._drain(replica)
        if not replicas and pool.desired == 0:
            await self._forget(pool)
            return
        await self._submit_missing(pool, pool.desired - len(wanted))

    async def _forget(self, pool: Pool) -> None:
        await self._pools.forget(pool.spec.name)
        self._retry_at.pop(pool.spec.name, None)

    async def _submit_missing(self, pool: Pool, missing: int) -> None:
        name = pool.spec.name
        if missing <= 0 or pool.held:
            self._retry_at.pop(name, None)
            return
        if self._retry_at.get(name, 0.0) > time.monotonic():
            return
        self._retry_at.pop(name, None)
        for _ in range(missing):
            if not await self._submit(pool):
                return

    async def _submit(self, pool: Pool) -> bool:
        replica = await self._pools.new_replica(pool.spec)
        try:
            job = await asyncio.to_thread(self._prepare_and_submit, replica)
        except InvalidInput as error:  # to try again would not help
            await self._end(replica, str(error))
            await self._hold(pool, error)
            return False
        except Unreachable as error:  # Slurm is away: no failure of the pool, and it may come back
            await self._end(replica, str(error))
            self._retry_at[pool.spec.name] = time.monotonic() + self._config.poll_moving[1]
            return False
        except _FAILURES as error:
            await self._finish(replica, str(error))
            return False
        logger.info("replica %s is job %s", replica.id, job)
        await self._pools.change(self._pools.replica(replica.id), job_id=job)
        self.ask_soon()
        return True

    def _prepare_and_submit(self, replica: Replica) -> str:
        places = self._config.places
        folder = places.replica(replica.id)
        folder.mkdir(mode=0o700, parents=True)
        write_atomically(folder / "job.json", encode(replica.spec))
        return self._executor.submit(replica.id, replica.spec, places)

    async def _drain(self, replica: Replica) -> None:
        """Let a worker finish what it holds, and end its job when it takes too long; one that serves nobody ends now."""
        now = time.monotonic()
        if now < self._cancel_at.get(replica.id, 0.0):
            return
        first = replica.id not in self._cancel_at
        self._cancel_at[replica.id] = now + self._config.drain
        if first and replica.state not in (*UNREGISTERED, _R.LOADING):
            await self._pools.change(replica, drain=True, state=_R.DRAINING)
            await self._tell(self._executor.drain, replica)
        else:
            await self._pools.change(replica, drain=True)
            await self._tell(self._executor.cancel, replica)
        self.ask_soon()

    async def _tell(self, order: Callable[[str], None], replica: Replica) -> None:
        try:
            await asyncio.to_thread(order, replica.status.job_id)
        except _FAILURES as error:
            logger.warning("replica %s, job %s: %s", replica.id, replica.status.job_id, error)


def _own_words(path: Path) -> str:
    """Why a worker ended, as it has written it down itself."""
    data = read_if_there(path)
    try:
        return cause_of(decode(data, EndRecord)) if data else ""
    except InvalidInput:
        return ""


def cause_of(record: EndRecord) -> str:
    return f"{record.cause}: {record.detail}" if record.detail else record.cause
