"""The daemon's life: take the lease, open the database and both interfaces, serve, and leave nothing behind but its work."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from nnsight_hpc import __version__
from nnsight_hpc.daemon.certificate import load_secret, server_context
from nnsight_hpc.daemon.changes import Changes
from nnsight_hpc.daemon.database import take_over
from nnsight_hpc.daemon.lease import claim, publish
from nnsight_hpc.daemon.parts import Parts
from nnsight_hpc.daemon.people import people_app
from nnsight_hpc.daemon.people_socket import PeoplesSocket, socket_path
from nnsight_hpc.daemon.pools import Pools
from nnsight_hpc.daemon.pools_api import take_all_down
from nnsight_hpc.daemon.reconciler import Reconciler
from nnsight_hpc.daemon.request_views import RequestViews
from nnsight_hpc.daemon.requests import Requests
from nnsight_hpc.daemon.settings import read_settings, share_of
from nnsight_hpc.daemon.store import Store
from nnsight_hpc.daemon.story import Stories
from nnsight_hpc.daemon.workers import workers_app
from nnsight_hpc.wire.errors import HpcError
from nnsight_hpc.wire.identity import user_name
from nnsight_hpc.wire.messages import PROTOCOL, Hello
from nnsight_hpc.wire.states import EndCause

if TYPE_CHECKING:
    import ssl

    from nnsight_hpc.daemon.admission import Share
    from nnsight_hpc.daemon.config import Config
    from nnsight_hpc.daemon.lease import Lease
    from nnsight_hpc.slurm.batch.executor import Executor

logger = logging.getLogger(__name__)

_SHUTDOWN = 5.0
"""How long answers that are being sent may take once the daemon stops, in seconds."""
_EXPIRE_EVERY = 60.0
"""Seconds between two looks at what has waited for too long."""
_FORGET_EVERY = 3600.0
"""Seconds between two looks at what ended so long ago that it is forgotten."""
_KILL_GRACE = 30.0
"""How long jobs may take to end after they were cancelled, in seconds."""


async def serve(config: Config, executor: Executor) -> None:
    """Run a daemon until it is told to stop. Raises `Conflict` when another one has the lease."""
    places = config.places
    for folder in (places.home, places.requests, places.replicas, places.datasets):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    places.home.chmod(0o700)
    settings = read_settings(places.settings)
    config, share = settings.applied_to(config), share_of(settings, places.settings)
    if share:
        places.datasets.chmod(0o700)  # where the owner had opened it: it holds other users' datasets, too
    with _listen_for_workers(config.executor) as workers:
        record = claim(
            config,
            socket_path=socket_path(config, share),
            address="127.0.0.1" if config.executor == "embedded" else socket.gethostname(),
            port=workers.getsockname()[1],
            version=__version__,
        )
        tls, secret = server_context(places), load_secret(places)  # nobody else can be making them now
        lease = publish(config, msgspec.structs.replace(record, certificate=places.certificate.read_text()))
        try:
            await _Daemon(config, share, executor, lease).run(workers, tls, secret)
        finally:
            lease.release()


def _listen_for_workers(executor: str) -> socket.socket:
    """On this machine only where the workers are here, too."""
    return socket.create_server(("127.0.0.1" if executor == "embedded" else "0.0.0.0", 0))  # noqa: S104


class _Daemon:
    """What runs while the lease is held."""

    def __init__(self, config: Config, share: Share | None, executor: Executor, lease: Lease) -> None:
        self._config, self._share, self._executor, self._lease = config, share, executor, lease
        self._stopping = asyncio.Event()
        self._end_asked = asyncio.Event()

    async def run(self, workers: socket.socket, tls: ssl.SSLContext, secret: str) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._stopping.set)
        async with AsyncExitStack() as stack:
            keeping = asyncio.ensure_future(self._keep_lease())  # from now on: a large database takes long to copy
            stack.callback(keeping.cancel)
            database = await asyncio.to_thread(take_over, self._config.places, self._lease.record.epoch)
            store = Store(database, self._lease.check)
            stack.push_async_callback(store.close)
            parts = await self._parts(store)
            await web.SockSite(await _runner(stack, workers_app(parts, secret)), workers, ssl_context=tls).start()
            people = PeoplesSocket(await _runner(stack, people_app(parts)), self._config, self._share)
            stack.callback(people.remove)
            await people.listen()
            stack.callback(parts.changes.close)  # long polls are answered before their connections close
            record = self._lease.record
            logger.info("epoch %s, process %s, on %s, port %s", record.epoch, record.pid, people.path, record.port)
            await self._until_stopped(parts, people, keeping)
        logger.info("stopped")

    async def _parts(self, store: Store) -> Parts:
        changes = Changes()
        stories = Stories(store)
        pools = Pools(store, changes, self._config, stories)
        await pools.load()
        requests = Requests(store, changes, pools, self._config)
        await requests.load()
        return Parts(
            config=self._config,
            share=self._share,
            hello=self._hello(),
            changes=changes,
            stories=stories,
            pools=pools,
            requests=requests,
            views=RequestViews(store, changes, pools, requests, stories),
            executor=self._executor,
            reconciler=Reconciler(pools, requests, self._executor, self._config),
            stop=self._stop,
        )

    def _hello(self) -> Hello:
        record = self._lease.record
        return Hello(
            protocol=PROTOCOL,
            version=__version__,
            owner=user_name(os.getuid()),
            host=record.host,
            pid=record.pid,
            epoch=record.epoch,
            executor=self._config.executor,
            home=str(self._config.places.home),
        )

    # -- the tasks beside the interfaces ---------------------------------------------------------------------------

    async def _until_stopped(self, parts: Parts, people: PeoplesSocket, keeping: asyncio.Future[None]) -> None:
        """Until the first of these returns, or fails: the daemon then ends with its error."""
        work = (
            self._stopping.wait(),
            keeping,
            self._keep_socket(people),
            self._take_back_lost(parts),
            self._expire(parts),
            self._forget_old(parts),
            self._end_replicas_when_asked(parts),
            parts.reconciler.run(),
        )
        tasks = [asyncio.ensure_future(task) for task in work]
        done, rest = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
        for task in done:
            task.result()

    async def _keep_lease(self) -> None:
        while True:
            await asyncio.sleep(self._config.lease_touch)
            try:
                ours = await asyncio.to_thread(self._lease.touch)
            except OSError as error:
                logger.warning("the lease could not be renewed: %s", error)
                continue
            if not ours:
                logger.error("another daemon has the lease, or it was removed: this one ends")
                return

    async def _keep_socket(self, people: PeoplesSocket) -> None:
        """Be found by those who come after the socket's folder was removed."""
        while True:
            await asyncio.sleep(self._config.socket_look)
            try:
                if await people.renew():
                    await asyncio.to_thread(self._lease.say_socket, people.path)
            except (OSError, HpcError) as error:
                logger.warning("the socket cannot be made anew: %s", error)

    async def _take_back_lost(self, parts: Parts) -> None:
        """Queue requests again that no worker has named for `Config.silence`."""
        while True:
            begun = time.monotonic()
            await asyncio.sleep(self._config.silence / 4)
            if time.monotonic() - begun > self._config.silence / 2:  # this process was stopped
                parts.requests.holdings.hear_all()
            if lost := parts.requests.holdings.silent(self._config.silence):
                why = f"its worker has said nothing of it for {self._config.silence:g} s"
                with suppress(HpcError):  # no lease, or no disk: the next round may do better
                    await parts.requests.take_back(lost, why, EndCause.LOST)

    async def _expire(self, parts: Parts) -> None:
        while True:
            await asyncio.sleep(min(_EXPIRE_EVERY, self._config.expires))
            with suppress(HpcError):
                await parts.requests.expire()

    async def _forget_old(self, parts: Parts) -> None:
        while True:
            with suppress(HpcError, OSError):
                await parts.requests.retention.forget_old()
            await asyncio.sleep(min(_FORGET_EVERY, self._config.keep))

    def _stop(self, workers: bool) -> None:
        (self._end_asked if workers else self._stopping).set()

    async def _end_replicas_when_asked(self, parts: Parts) -> None:
        """Take all pools down, and wait for the end of their jobs as long as they may take."""
        await self._end_asked.wait()
        await take_all_down(parts)
        try:
            async with asyncio.timeout(self._config.drain + _KILL_GRACE):
                pause = self._config.asked
                while parts.pools.names():
                    parts.reconciler.look_soon()
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, self._config.poll[0])  # most ends are told by the workers themselves
        except TimeoutError:
            logger.warning("these replicas have not ended: %s", [replica.id for replica in parts.pools.replicas()])


async def _runner(stack: AsyncExitStack, app: web.Application) -> web.AppRunner:
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=_SHUTDOWN)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    return runner
