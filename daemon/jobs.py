"""The jobs of replicas: submitted, ended, and looked at through the executor, which may be slow or away.

Its programs run in threads of their own, so that a batch system that does not answer stops nothing else. One look at all
jobs is taken seldom: workers tell the rest themselves.
"""

from __future__ import annotations

import asyncio
import logging
import random
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from nnsight_hpc.daemon.records import UNREGISTERED, job_of, primaries, wanted
from nnsight_hpc.slurm.batch.executor import JobState
from nnsight_hpc.wire.errors import HpcError, InvalidInput, NotFound, Unreachable
from nnsight_hpc.wire.files import read_if_there, write_atomically
from nnsight_hpc.wire.messages import decode, encode
from nnsight_hpc.wire.pools import PoolSpec
from nnsight_hpc.wire.states import EndCause, ReplicaState

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine
    from typing import Any

    from nnsight_hpc.daemon.config import Config
    from nnsight_hpc.daemon.pools import Pools
    from nnsight_hpc.daemon.records import Replica
    from nnsight_hpc.slurm.batch.executor import Executor, JobInfo, Survey

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
_R = ReplicaState
_THREADS = 4
FAILURES = (HpcError, OSError, subprocess.SubprocessError)
"""What an executor may raise: its own errors, and those of the programs that it runs."""


class Jobs:
    """What is asked of the executor.

    Parameters
    ----------
    ended
        Called with a replica's id, the cause where it is known, and words, when its job has ended or was never there.
    refused
        Called with a replica and the error, when a job like its will never be taken.
    """

    def __init__(
        self,
        pools: Pools,
        executor: Executor,
        config: Config,
        ended: Callable[[str, EndCause | None, str], Awaitable[None]],
        refused: Callable[[Replica, InvalidInput], Awaitable[None]],
    ) -> None:
        self._pools, self._executor, self._config = pools, executor, config
        self._ended, self._refused = ended, refused
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="jobs")
        self._tasks: set[asyncio.Task[None]] = set()
        self._submitting: set[str] = set()
        self._asked: set[str] = set()  # pools that a person waits for
        self._looked, self._look_at, self._looking = float("-inf"), 0.0, False

    # -- orders --------------------------------------------------------------------------------------------------

    def submit(self, replica: Replica) -> None:
        self._submitting.add(replica.id)
        self._in_background(self._submit(replica))

    def drain(self, replica: Replica) -> None:
        """Its worker finishes what it holds, and ends."""
        self._in_background(self._order(self._executor.drain, replica))

    def cancel(self, replica: Replica) -> None:
        """End its job now. One that has not begun is gone with that: nobody will tell of its end."""
        self._in_background(self._cancel(replica))

    def ask(self, pool: str) -> None:
        """A person waits for news of this pool."""
        self._asked.add(pool)
        self.look_soon()

    def look_soon(self) -> None:
        """Somebody asks: look in `Config.asked`, if it would be later otherwise."""
        self._look_at = min(self._look_at, time.monotonic() + self._config.asked)

    def look_if_due(self) -> None:
        replicas = self._pools.replicas()
        if all(replica.id in self._submitting for replica in replicas):
            if not replicas:
                self._look_at = float("inf")  # until somebody asks, or a job was submitted
            return
        now = time.monotonic()
        if self._look_at == float("inf"):  # a job that was taken up
            self._look_at = self._soonest(now)
        if self._looking or now < self._look_at:
            return
        self._looking, self._looked = True, now
        self._look_at = self._looked + random.uniform(*self._config.poll)  # noqa: S311 - not a secret
        self._in_background(self._look())

    def _in_background(self, work: Coroutine[Any, Any, object]) -> None:
        task = asyncio.create_task(_reported(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def stop(self) -> None:
        """Take up no answer any more; what runs in threads is not waited for."""
        for task in self._tasks:
            task.cancel()
        self._threads.shutdown(wait=False)

    async def _call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, lambda: function(*args, **kwargs))

    # -- submitting and ending -----------------------------------------------------------------------------------

    async def _submit(self, replica: Replica) -> None:
        try:
            job = await self._call(self._prepare_and_submit, replica)
        except InvalidInput as error:  # to try again would not help
            await self._ended(replica.id, EndCause.NOT_SUBMITTED, str(error))
            await self._refused(replica, error)
        except Unreachable as error:  # the job may be there all the same: the next look will tell
            with suppress(NotFound):
                await self._pools.change(replica, reason=str(error))
        except FAILURES as error:
            await self._ended(replica.id, EndCause.NOT_SUBMITTED, str(error))
        else:
            await self._submitted(replica, job)
        finally:
            self._submitting.discard(replica.id)
        self._look_after_submission(replica.spec.name)

    def _prepare_and_submit(self, replica: Replica) -> str:
        places = self._config.places
        folder = places.replica(replica.id)
        folder.mkdir(mode=0o700, parents=True)
        write_atomically(folder / "job.json", encode(replica.spec))
        return self._executor.submit(replica.id, replica.spec, places, begin=replica.begin)

    async def _submitted(self, replica: Replica, job: str) -> None:
        logger.info("replica %s is job %s", replica.id, job, extra={"replica": replica.id, "job": job})
        reason = replica.status.reason if replica.drain else ""
        try:
            replica = await self._pools.change(replica, job_id=job, reason=reason)
        except NotFound:  # it was ended while it was submitted
            await self._call(self._executor.cancel, job)
            return
        if replica.drain:
            self.cancel(replica)

    def _look_after_submission(self, pool: str) -> None:
        now = time.monotonic()
        soonest = now + self._config.asked if pool in self._asked else self._soonest(now)
        self._look_at = min(self._look_at, soonest)

    def _soonest(self, now: float) -> float:
        """When jobs may be looked at again for the sake of one that is new, though nobody asks for it."""
        return max(now + self._config.asked, self._looked + self._config.poll[0])

    async def _cancel(self, replica: Replica) -> None:
        if await self._order(self._executor.cancel, replica) and replica.waits:
            await self._ended(replica.id, EndCause.CANCELLED, "")

    async def _order(self, order: Callable[[str], None], replica: Replica) -> bool:
        if not replica.status.job_id:
            return False
        try:
            await self._call(order, replica.status.job_id)
        except FAILURES as error:
            logger.warning("replica %s, job %s: %s", replica.id, replica.status.job_id, error)
            return False
        return True

    # -- looking -------------------------------------------------------------------------------------------------

    async def _look(self) -> None:
        asked = {pool for pool in self._asked if not any(r.id in self._submitting for r in self._pools.replicas(pool))}
        nameless = [r.id for r in self._pools.replicas() if not r.status.job_id and r.id not in self._submitting]
        try:
            survey = await self._survey()
            if survey is not None:
                await self._learn_all(survey, nameless, asked)
        finally:
            self._looking = False
            self._asked -= asked

    async def _survey(self) -> Survey | None:
        jobs = [replica.status.job_id for replica in self._pools.replicas() if replica.status.job_id]
        try:
            survey = await self._call(self._executor.survey, jobs, self._config.places)
        except FAILURES as error:
            logger.warning("the executor could not say what becomes of its jobs: %s", error)
            self._pools.trouble = str(error)
            return None
        self._pools.trouble = survey.doubt
        return survey

    async def _learn_all(self, survey: Survey, nameless: list[str], asked: set[str]) -> None:
        for replica in self._pools.replicas():
            if info := survey.jobs.get(replica.status.job_id):
                await self._learn(replica, info, asked=replica.spec.name in asked)
        for name, job in survey.ours.items():
            with suppress(NotFound):  # it has ended in the meantime
                await self._recognise(name, job)
        for replica in self._pools.replicas():
            if replica.id in nameless and not (replica.status.job_id or survey.doubt):
                words = replica.status.reason or "the daemon was ended while it submitted the job"
                await self._ended(replica.id, EndCause.NOT_SUBMITTED, words)

    async def _learn(self, replica: Replica, info: JobInfo, *, asked: bool) -> None:
        position = await self._position(replica) if asked and info.state == JobState.PENDING else None
        with suppress(NotFound):  # it has ended in the meantime
            replica = self._pools.replica(replica.id)
            if info.state == JobState.ENDED:
                await self._ended(replica.id, info.cause, info.reason)
            elif info.state == JobState.RUNNING:
                await self._runs(replica, info)
            elif info.state == JobState.PENDING and replica.state in UNREGISTERED:
                reason = replica.status.reason if replica.drain else info.reason
                begins = info.begins or replica.begin
                await self._pools.change(replica, state=_R.PENDING, reason=reason, begins=begins, position=position)

    async def _runs(self, replica: Replica, info: JobInfo) -> None:
        known: dict[str, Any] = {
            "ends": info.ends or replica.status.ends,
            "started": info.started or replica.status.started,
        }
        if replica.state in UNREGISTERED:
            reason = replica.status.reason if replica.drain else info.reason
            known |= {"state": _R.STARTING, "host": info.host, "reason": reason, "begins": None, "position": None}
        await self._pools.change(replica, **known)

    async def _recognise(self, name: str, job: str) -> None:
        """A job of ours that has not ended: of a replica whose job we did not learn, of one that has ended, or a stray."""
        replica = self._pools.remembered(name)
        if replica is None:
            await self._adopt(name, job)
        elif replica.state.ended:
            if time.time() - replica.status.changed > self._config.lingering:
                logger.warning("job %s is still there, though replica %s has ended: cancelled", job, name)
                await self._order(self._executor.cancel, replica)
        elif not replica.status.job_id:
            await self._submitted(replica, job)

    async def _adopt(self, name: str, job: str) -> None:
        """Take up a job that this daemon does not know, when its pool is to have one more like it."""
        data = await asyncio.to_thread(read_if_there, self._config.places.replica(name) / "job.json")
        try:
            spec = decode(data, PoolSpec) if data else None
        except InvalidInput:
            return
        pool = self._pools.find(spec.name) if spec else None
        if spec is None or pool is None or job_of(spec) != job_of(pool.spec):
            return
        if len(primaries(wanted(pool, self._pools.of(spec.name)))) < pool.desired:
            await self._pools.adopt(name, spec, job)

    async def _position(self, replica: Replica) -> int | None:
        try:
            return await self._call(self._executor.position, replica.status.job_id)
        except FAILURES as error:
            logger.warning("the position of job %s is not known: %s", replica.status.job_id, error)
            return None


async def _reported(work: Coroutine[Any, Any, object]) -> None:
    try:
        await work
    except Exception:  # a full disk, a lost lease: the next look may do better
        logger.exception("a job could not be looked after")
