"""From the command line to the end of the worker: register, load, run one forward, serve, say why it ended.

Of several ranks each runs this program; once they have met, rank 0 does all that, and the others follow it.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import socket
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

import nnsight_hpc
from nnsight_hpc.slurm.batch.executor import JOB_VARIABLE
from nnsight_hpc.slurm.worker.control import Control, Drained
from nnsight_hpc.slurm.worker.courier import Courier
from nnsight_hpc.slurm.worker.ending import end, end_hanging, record_of, write
from nnsight_hpc.slurm.worker.hang import HangWatch
from nnsight_hpc.slurm.worker.heartbeat import Heartbeat
from nnsight_hpc.slurm.worker.link import DECISIVE, DaemonAddress, Link
from nnsight_hpc.slurm.worker.loading import load_model
from nnsight_hpc.slurm.worker.manners import step_back, step_forward
from nnsight_hpc.slurm.worker.orders import OrdersListener
from nnsight_hpc.slurm.worker.signals import watch_signals
from nnsight_hpc.wire.errors import Denied, HpcError, InvalidInput
from nnsight_hpc.wire.files import read_if_there, write_atomically
from nnsight_hpc.wire.logs import log_as_json
from nnsight_hpc.wire.messages import decode
from nnsight_hpc.wire.names import check_name
from nnsight_hpc.wire.places import Places, places_at
from nnsight_hpc.wire.pools import PoolSpec
from nnsight_hpc.wire.states import EndCause
from nnsight_hpc.wire.workers import WorkerHello, WorkerWelcome

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nnsight_hpc.slurm.worker.model import Model
    from nnsight_hpc.slurm.worker.room import Room
    from nnsight_hpc.slurm.worker.team import Team

_WELCOME = 5.0
"""Seconds to wait for the daemon's welcome before a worker that knows its pool loads the model without it."""
_TURN = 0.0005
"""Seconds after which the model's thread lets one that waits for Python's lock go first: those talk to the daemon."""
_OUTLIVE = 5.0
"""Seconds after SIGTERM in which one of several ranks can end in order; it may wait for a rank that is no more."""
logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a worker to its end; the exit code is 0 unless it failed."""
    options = _parser().parse_args(arguments)
    log_as_json("worker", replica=options.replica)
    step_back()
    sys.setswitchinterval(_TURN)
    places = places_at(Path(options.home).absolute())
    control = Control(options.replica, ends=_job_end())
    watch_signals(control, outlive=_OUTLIVE if options.ranks > 1 else None)
    if options.ranks > 1:
        return _several(options.ranks, control, places)
    return _lead(control, places, None)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m nnsight_hpc.slurm.worker", description=__doc__)
    parser.add_argument("--home", required=True, help="the daemon's folder on the shared file system")
    parser.add_argument("--replica", required=True, help="the id that the daemon gave this replica", type=_replica)
    parser.add_argument("--ranks", default=1, type=int, help="how many MPI ranks run this program  [default: 1]")
    return parser


def _replica(text: str) -> str:
    try:
        return check_name(text, of="replica")
    except InvalidInput as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _several(ranks: int, control: Control, places: Places) -> int:
    """One of several ranks, to its end; the first that cannot go on writes down why."""

    def last_words(error: HpcError) -> None:
        write(record_of(control.replica, error), places)

    def lost(error: HpcError) -> None:
        write(record_of(control.replica, error, EndCause.LOST), places)

    try:
        from nnsight_hpc.slurm.worker.team import Team  # noqa: PLC0415 - MPI, which a process alone need not have

        team = Team(ranks, last_words, lost)
        if team.leads:
            write_atomically(places.replica(control.replica) / "ranks.json", json.dumps(team.world.nodes).encode())
            code = _lead(control, places, team)
        else:
            code = _follow(team, control)
        team.part()
    except HpcError as error:
        logger.error("this rank ends: %s", error)  # noqa: TRY400 - its words are for people
        last_words(error)
    except Exception as error:
        logger.exception("this rank failed")
        last_words(_unexpected(error))
    else:
        return code
    return 1


def _follow(team: Team, control: Control) -> int:
    """What ranks 1 and further do; rank 0 tells of what went wrong on all."""
    if spec := team.told():
        try:
            model = team.load(spec, control)
        except HpcError as error:
            logger.info("the model is not loaded: %s", error.what)
        else:
            step_forward()
            model.follow()
    return 0


def _lead(control: Control, places: Places, team: Team | None) -> int:
    """What the one process does that talks to the daemon."""
    address = DaemonAddress(places)
    try:
        if team is None:
            _check_ranks(int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")), None)
        _work(control, places, address, team)
    except Drained:
        logger.info("told to end while loading")
    except HpcError as error:
        control.fail(error)
    except Exception as error:
        logger.exception("the worker failed")
        control.fail(_unexpected(error))
    return end(control, places, address, alone=team is None)


def _unexpected(error: Exception) -> HpcError:
    return HpcError("the worker met an error that it did not expect", why=f"{type(error).__name__}: {error}")


def _check_ranks(wanted: int, team: Team | None) -> None:
    """Refuse to be one of several copies. (SLURM_NTASKS would not do: it is set in a shell of salloc, too.)"""
    if wanted != (found := team.world.size if team else 1):
        raise InvalidInput(
            f"the replica is to have {wanted} ranks, and this worker was started as {found}",
            next="start it by the script in the replica's folder",
        )


def _work(control: Control, places: Places, address: DaemonAddress, team: Team | None) -> None:
    job = read_if_there(places.replica(control.replica) / "job.json")
    hello = _hello(control.replica, team)
    welcome = _register(control, address, hello, known=job is not None)
    if job is not None:
        spec = decode(job, PoolSpec, what="job.json")
    else:
        assert welcome is not None, "without job.json we wait for the welcome"
        spec = welcome.pool
    _check_ranks(spec.tp, team)
    heartbeat, listener = Heartbeat(control, address), OrdersListener(control, address)
    heartbeat.start()
    listener.start()
    HangWatch(control, functools.partial(end_hanging, control.replica, places, address))
    try:
        with load_model(spec, control, places, team) as model:
            control.leave_if_draining()
            _serve(model, control, functools.partial(Courier, control, address, hello, welcome), spec, Link(address))
    finally:
        listener.stop()
        heartbeat.stop()


def _hello(replica: str, team: Team | None) -> WorkerHello:
    return WorkerHello(
        replica=replica,
        job_id=_job_id(),
        host=socket.gethostname(),
        pid=os.getpid(),
        ranks=team.world.size if team else 1,
        version=nnsight_hpc.__version__,
    )


def _job_id() -> str:
    """The id that the executor gives to the job: Slurm's, or that of the process that runs the local script."""
    script = os.environ.get(JOB_VARIABLE)
    if script is None and "SLURM_JOB_ID" in os.environ:
        return os.environ["SLURM_JOB_ID"]
    process = psutil.Process(int(script) if script else None)
    return f"{process.pid}:{process.create_time():.2f}"


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
        control.leave_if_draining()
        logger.warning("no daemon answers; loading the model meanwhile")
        return None
    finally:
        link.close()


def _serve(model: Model, control: Control, made: Callable[[Room], Courier], spec: PoolSpec, slices: Link) -> None:
    from nnsight_hpc.slurm.worker.loop import Runner  # noqa: PLC0415 - torch takes seconds; register before
    from nnsight_hpc.slurm.worker.slices import SharedSlices  # noqa: PLC0415 - as above

    control.on_drain(slices.abandon)
    runner = Runner(model, control, spec.request_memory, functools.partial(SharedSlices, slices, control))
    if spec.factory is None:
        runner.warm_up()
    step_forward()
    control.free = runner.budget()
    control.ready()
    courier = made(runner.room)
    courier.start()
    runner.serve(courier)


def _job_end() -> float | None:
    """When Slurm will end the job, where Slurm says so (from 23.02 on)."""
    end_time = os.environ.get("SLURM_JOB_END_TIME", "")
    return float(end_time) if end_time.isdigit() else None
