"""From the command line to the end of the worker: register, load, run one forward, serve, say why it ended."""

from __future__ import annotations

import argparse
import logging
import os
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

import nnsight_hpc
from nnsight_hpc.slurm.worker.control import Control
from nnsight_hpc.slurm.worker.courier import Courier
from nnsight_hpc.slurm.worker.ending import end
from nnsight_hpc.slurm.worker.heartbeat import Heartbeat
from nnsight_hpc.slurm.worker.link import DECISIVE, DaemonAddress, Link
from nnsight_hpc.slurm.worker.orders import OrdersListener
from nnsight_hpc.slurm.worker.signals import watch_signals
from nnsight_hpc.wire.errors import Denied, HpcError, InvalidInput
from nnsight_hpc.wire.files import read_if_there
from nnsight_hpc.wire.messages import PoolSpec, WorkerHello, WorkerWelcome, decode
from nnsight_hpc.wire.names import check_name
from nnsight_hpc.wire.places import Places, places_at

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nnsight_hpc.models import Loaded

_WELCOME = 5.0
"""Seconds to wait for the daemon's welcome before a worker that knows its pool loads the model without it."""
logger = logging.getLogger(__name__)


class _Drained(BaseException):
    """Leaves the loading of weights. Not an `Exception`: nothing on the way may take it for a failure."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a worker to its end; the exit code is 0 unless it failed."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    places = places_at(Path(options.home).absolute())
    control = Control(options.replica, ends=_job_end())
    address = DaemonAddress(places)
    watch_signals(control)
    try:
        _check_ranks(int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")))
        _work(control, places, address)
    except _Drained:
        logger.info("told to end while loading")
    except HpcError as error:
        control.fail(error)
    except Exception as error:
        logger.exception("the worker failed")
        control.fail(HpcError("the worker met an error that it did not expect", why=f"{type(error).__name__}: {error}"))
    return end(control, places, address)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m nnsight_hpc.slurm.worker", description=__doc__)
    parser.add_argument("--home", required=True, help="the daemon's folder on the shared file system")
    parser.add_argument("--replica", required=True, help="the id that the daemon gave this replica", type=_replica)
    return parser


def _replica(text: str) -> str:
    try:
        return check_name(text, of="replica")
    except InvalidInput as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _check_ranks(tasks: int) -> None:
    """Refuse to be one of several copies. (SLURM_NTASKS would not do: it is set in a shell of salloc, too.)"""
    if tasks > 1:
        raise InvalidInput(
            f"the replica has {tasks} tasks, and can have one",
            why="tensor parallelism is not in this version",
            next="set nodes and tasks_per_node of the pool to 1",
        )


def _work(control: Control, places: Places, address: DaemonAddress) -> None:
    job = read_if_there(places.replica(control.replica) / "job.json")
    hello = _hello(control.replica)
    welcome = _register(control, address, hello, known=job is not None)
    if job is not None:
        spec = decode(job, PoolSpec, what="job.json")
    else:
        assert welcome is not None, "without job.json we wait for the welcome"
        spec = welcome.pool
    _check_ranks(spec.nodes * spec.tasks_per_node)
    heartbeat, listener = Heartbeat(control, address), OrdersListener(control, address)
    heartbeat.start()
    listener.start()
    try:
        loaded = _load(spec, control, places)
        _serve(loaded, control, Courier(control, address, hello, welcome), spec.request_memory)
    finally:
        listener.stop()
        heartbeat.stop()


def _hello(replica: str) -> WorkerHello:
    process = psutil.Process()
    local = f"{process.pid}:{process.create_time():.2f}"  # the job id that the embedded executor gives
    return WorkerHello(
        replica=replica,
        job_id=os.environ.get("SLURM_JOB_ID", local),
        host=socket.gethostname(),
        pid=process.pid,
        ranks=1,
        version=nnsight_hpc.__version__,
    )


def _register(control: Control, address: DaemonAddress, hello: WorkerHello, *, known: bool) -> WorkerWelcome | None:
    """The daemon's welcome; None when no daemon answers in time, and we know without it what to load."""
    link, decisive = Link(address), (*DECISIVE, Denied)
    control.on_drain(link.abandon)
    hurry = threading.Event()
    if known:
        hurry.set()
    try:
        return link.call("/w1/register", hello, WorkerWelcome, decisive=decisive, hurry=hurry, grace=_WELCOME)
    except HpcError as error:
        if isinstance(error, decisive):
            raise
        _leave_if_draining(control)
        logger.warning("no daemon answers; loading the model meanwhile")
        return None
    finally:
        link.close()


def _load(spec: PoolSpec, control: Control, places: Places) -> Loaded:
    from nnsight_hpc.models import load  # noqa: PLC0415 - torch takes seconds, in which the daemon should know of us
    from nnsight_hpc.slurm.worker.skeleton import publish  # noqa: PLC0415
    from nnsight_hpc.slurm.worker.warmup import first_forward, placement  # noqa: PLC0415

    def progress(loaded: int, total: int) -> None:
        control.loading(loaded, total)
        _leave_if_draining(control)

    begun = time.monotonic()
    _leave_if_draining(control)
    control.identified(publish(spec, places.model_copy(control.replica)))
    loaded = load(spec.model, dtype=spec.dtype, revision=spec.revision, progress=progress, **placement())
    _leave_if_draining(control)
    first_forward(loaded)
    logger.info("%s is loaded and has answered a forward after %.1f s", spec.model, time.monotonic() - begun)
    return loaded


def _leave_if_draining(control: Control) -> None:
    if control.draining.is_set():
        raise _Drained


def _serve(loaded: Loaded, control: Control, courier: Courier, budget: int | None) -> None:
    from nnsight_hpc.slurm.worker.loop import Runner  # noqa: PLC0415 - as in _load

    control.ready()
    courier.start()
    Runner(loaded, control, budget).serve(courier)


def _job_end() -> float | None:
    """When Slurm will end the job, where Slurm says so (from 23.02 on)."""
    end_time = os.environ.get("SLURM_JOB_END_TIME", "")
    return float(end_time) if end_time.isdigit() else None
