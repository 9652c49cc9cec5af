"""``nnsight-hpc up``, ``down`` and ``logs``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import click
import msgspec

from nnsight_hpc.client import config
from nnsight_hpc.client.app import App, command, note, pass_app
from nnsight_hpc.client.config import LOCAL
from nnsight_hpc.client.waiting import (
    check_not_held,
    messages,
    newest,
    replica_words,
    wait_until_empty,
    wait_until_ready,
)
from nnsight_hpc.wire.errors import InvalidInput, NotFound
from nnsight_hpc.wire.messages import PoolSpec, PoolStatus, decode
from nnsight_hpc.wire.names import check_name, is_request_id
from nnsight_hpc.wire.states import ReplicaState

if TYPE_CHECKING:
    from collections.abc import Callable

    from nnsight_hpc.wire.http import HttpClient
    from nnsight_hpc.wire.messages import LogLine


class Bytes(click.ParamType[int]):
    """A size as Slurm writes it: a number with K, M, G or T (powers of 1024); without, bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        number, unit = (value[:-1], value[-1].upper()) if value[-1:].isalpha() else (value, "")
        if not number.isascii() or not number.isdigit() or unit not in _UNITS:
            self.fail(f"{value!r} is not a size like 500M or 8G", param, ctx)
        return int(number) * _UNITS[unit]


_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_RESOURCES = (
    click.option("--replicas", type=click.IntRange(1), help="Workers that hold the model.  [default: 1]"),
    click.option("--nodes", type=click.IntRange(1), help="Nodes for each replica.  [default: 1]"),
    click.option("--tasks-per-node", type=click.IntRange(1), help="MPI ranks on each node.  [default: 1]"),
    click.option("--gpus-per-node", type=click.IntRange(0), help="GPUs on each node.  [default: 0]"),
    click.option("--gres", metavar="LIST", help="Slurm's --gres, where a site wants it in place of --gpus-per-node."),
    click.option("--cpus-per-task", type=click.IntRange(1), help="Cores for each rank."),
    click.option("--mem", metavar="SIZE", help="Memory of each node, as 16G."),
    click.option(
        "--request-memory",
        type=Bytes(),
        metavar="SIZE",
        help="What one request may need beside the model, as 8G.  [default: what is free]",
    ),
    click.option("--time", metavar="TIME", help="Walltime, as 1-00:00:00.  [default: 01:00:00]"),
    click.option("--partition", metavar="NAME", help="Slurm's partition."),
    click.option("--account", metavar="NAME", help="Slurm's account."),
    click.option("--qos", metavar="NAME", help="Slurm's quality of service."),
    click.option("--constraint", metavar="LIST", help="Slurm's node features."),
    click.option("--reservation", metavar="NAME", help="Slurm's reservation."),
    click.option("--mpi", metavar="TYPE", help="srun's --mpi.  [default: auto]"),
    click.option(
        "--setup",
        multiple=True,
        metavar="LINE",
        help="A line of shell before the worker, as 'module load x'; repeatable.",
    ),
    click.option(
        "--sbatch-arg", "sbatch_args", multiple=True, metavar="ARG", help="Any further sbatch argument; repeatable."
    ),
)


def _resource_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_RESOURCES):
        function = option(function)
    return function


@command()
@click.argument("name")
@click.option("--model", required=True, metavar="PATH|ID", help="A folder on the cluster, or a Hugging Face id.")
@click.option("--revision", metavar="REVISION", help="Of a Hugging Face id: branch, tag or commit.")
@click.option("--dtype", metavar="DTYPE", help="auto, float32, bfloat16, float16.  [default: auto]")
@_resource_options
@click.option("--wait", is_flag=True, help="Return when the model serves.")
@pass_app
def up(app: App, /, name: str, wait: bool, model: str, **options: Any) -> None:
    """Keep a model resident, or change how it is.

    NAME is the pool's; workers are submitted until it has as many replicas as asked for.
    """
    spec = _spec(app, name, model, options)
    client = app.client()
    known = _not_awaited(client, spec)
    pool = client.put(f"/v1/pools/{name}", spec, PoolStatus)
    if wait:
        pool = wait_until_ready(client, pool, known=known)
    check_not_held(pool)
    app.answer(pool, lambda: _print(pool))


@command()
@click.argument("name")
@click.option("--wait", is_flag=True, help="Return when all workers have ended.")
@pass_app
def down(app: App, name: str, wait: bool) -> None:
    """End a pool's workers; what runs has a minute.

    What waits for the pool fails. A dump stops at once, and goes on when it is started again on a pool with the same model.
    """
    client = app.client(start=False)
    pool = decode(client.call("DELETE", f"/v1/pools/{check_name(name, of='pool')}"), PoolStatus)
    if wait:
        pool = wait_until_empty(client, pool)
    left = sum(not replica.state.ended for replica in pool.replicas)
    words = (
        f"{left} worker{'s' * (left > 1)} finish{'es' * (left == 1)} and end{'s' * (left == 1)}"
        if left
        else "it has ended"
    )
    app.answer(pool, lambda: print(f"Pool {name}: {words}."))


@command()
@click.argument("name", metavar="POOL|ID")
@click.option("--lines", type=click.IntRange(1), default=50, show_default=True, help="How many, from a log's end.")
@click.option("--replica", metavar="ID", help="One of the pool's replicas; else the newest.")
@click.option("-f", "--follow", is_flag=True, help="Go on until the request has ended.")
@pass_app
def logs(app: App, name: str, lines: int, replica: str | None, follow: bool) -> None:
    """Show a pool's newest log, or what a request says.

    A request says what its `log` and `print` say, and all of it is shown.
    """
    if is_request_id(name):
        _request_log(app, name, follow=follow)
        return
    if follow:
        raise InvalidInput("only what a request says can be followed", why=f"{name} is not the id of a request")
    query = urlencode({"lines": lines} | ({"replica": replica} if replica else {}))
    text = (
        app.client(start=False)
        .call("GET", f"/v1/pools/{check_name(name, of='pool')}/log?{query}")
        .decode("utf-8", "replace")
    )
    app.answer({"pool": name, "log": text}, lambda: print(text, end="" if text.endswith("\n") else "\n"))


def _request_log(app: App, request: str, *, follow: bool) -> None:
    said: list[LogLine] = []
    for log in messages(app.client(start=False), request, wait=follow):
        said += log.lines
        if not app.json:
            print(*(line.text + "\n" for line in log.lines), sep="", end="", flush=True)
    app.answer({"request": request, "log": said}, lambda: None)


def _spec(app: App, name: str, model: str, options: dict[str, Any]) -> PoolSpec:
    """What was given as a `PoolSpec`; a model's folder on this machine becomes an absolute path."""
    check_name(name, of="pool")
    if config.load().chosen(app.cluster) == LOCAL and Path(model).expanduser().is_dir():
        model = str(Path(model).expanduser().absolute())
    given = {key: value for key, value in options.items() if value is not None}
    try:
        return msgspec.convert({"name": name, "model": model, **given}, PoolSpec)
    except msgspec.ValidationError as error:
        raise InvalidInput("the pool's options are wrong", why=str(error)) from None


def _not_awaited(client: HttpClient, spec: PoolSpec) -> frozenset[str]:
    """Replicas whose end is no failure of what is asked for now: they have ended, are leaving, or may be replaced."""
    try:
        pool = client.get(f"/v1/pools/{spec.name}", PoolStatus)
    except NotFound:
        return frozenset()
    changes = pool.spec != spec or pool.desired == 0
    leaving = (ReplicaState.DRAINING, ReplicaState.ENDED)
    return frozenset(replica.id for replica in pool.replicas if changes or replica.state in leaving)


def _print(pool: PoolStatus) -> None:
    replica = newest(pool)
    print(f"Pool {pool.spec.name}: {replica_words(replica) if replica else 'its first worker is being submitted'}")
    if replica is None or replica.state not in ("READY", "BUSY"):
        note(f"nnsight-hpc status, or nnsight-hpc up {pool.spec.name} … --wait")
