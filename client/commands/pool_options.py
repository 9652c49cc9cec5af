"""What a pool is described by: a definition in a file, and options that count more."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nnsight_hpc.client import config
from nnsight_hpc.client.config import LOCAL
from nnsight_hpc.client.definitions import CLUSTER, check_values, memory_bytes
from nnsight_hpc.wire.errors import InvalidInput, NotFound
from nnsight_hpc.wire.names import check_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from nnsight_hpc.client.app import App


class Bytes(click.ParamType[int]):
    """A size as Slurm writes it."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return memory_bytes(value)
        except InvalidInput as error:
            self.fail(error.what, param, ctx)


class Replicas(click.ParamType["int | str"]):
    """A number, or ``LEAST:MOST``, which is checked with the other keys."""

    name = "replicas"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:  # noqa: ARG002
        return int(value) if value.isascii() and value.isdigit() else value


_OPTIONS = (
    click.option(
        "--file",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        metavar="FILE",
        help="A TOML file with [pool.NAME]; else the configuration's.",
    ),
    click.option("--model", metavar="PATH|ID", help="A folder on the cluster, or a Hugging Face id."),
    click.option("--revision", metavar="REVISION", help="Of a Hugging Face id: branch, tag or commit."),
    click.option("--dtype", metavar="DTYPE", help="auto, float32, bfloat16, float16.  [default: auto]"),
    click.option(
        "--factory", metavar="PACKAGE:FUNCTION", help="Makes a module of your own; --model is then its safetensors."
    ),
    click.option(
        "--replicas",
        type=Replicas(),
        metavar="N|LEAST:MOST",
        help="Workers that hold the model; between these as its queue wants.  [default: 1]",
    ),
    click.option(
        "--idle", metavar="DURATION", help="Release what was idle for so long and is above LEAST, as 30m, 2h."
    ),
    click.option(
        "--succession",
        type=click.Choice(["overlap", "gap"]),
        help="The next job serves before a walltime ends, or follows after it (one job at a time).  [default: overlap]",
    ),
    click.option("--node-cache", metavar="FOLDER", help="On the nodes' own disks, for the weights of the next start."),
    click.option("--nodes", type=click.IntRange(1), help="Nodes for each replica.  [default: 1]"),
    click.option(
        "--tp",
        type=click.IntRange(1),
        help="Degree of tensor parallelism: the MPI ranks of each replica, on all its nodes.  [default: 1]",
    ),
    click.option(
        "--replicated/--split",
        default=None,
        help="Whether each rank holds the whole model, where it cannot be split.  [default: split]",
    ),
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
    click.option("--mpi", metavar="TYPE", help="srun's --mpi, where what is found is wrong.  [default: auto]"),
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


def pool_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """``--file``, and an option for each key of a pool but ``policy``, which only a file can have."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def described(app: App, name: str, file: Path | None, options: dict[str, Any]) -> dict[str, Any]:
    """All keys that were given for a pool, as they are sent; `app` talks to the cluster that its definition names.

    Raises `InvalidInput` without a model, and for values that mean nothing; `NotFound` for a name that `file` has not.
    """
    check_name(name, of="pool")
    keys = _definition(name, file)
    bound = keys.pop(CLUSTER, None)
    app.cluster = app.cluster or bound
    keys |= {key: value for key, value in options.items() if value not in (None, ())}
    if "model" not in keys:
        raise _no_model(name)
    check_values(name, keys)
    if config.load().chosen(app.cluster) == LOCAL:
        base = Path() if options["model"] else (file or config.config_file()).parent
        keys["model"] = _absolute(keys["model"], base)
    return {"name": name, **keys}


def _definition(name: str, file: Path | None) -> dict[str, Any]:
    pools = config.load(file).pool
    if file is not None and name not in pools:
        raise NotFound(f"there is no [pool.{name}]", where=str(file), why=_known(pools), next=_meant(name, pools))
    return dict(pools.get(name, {}))


def _no_model(name: str) -> InvalidInput:
    path, pools = config.config_file(), config.load().pool
    return InvalidInput(
        f"pool {name} has no model: neither --model, nor one in its definition",
        where=str(path),
        why=_known(pools),
        next=_meant(name, pools) or f"give --model PATH|ID, or put [pool.{name}] with a model into that file",
    )


def _known(pools: dict[str, Any]) -> str:
    return f"defined there: {', '.join(sorted(pools)) or 'none'}"


def _meant(name: str, pools: dict[str, Any]) -> str:
    close = difflib.get_close_matches(name, pools, n=1)
    return f"did you mean {close[0]!r}?" if close and close[0] != name else ""


def _absolute(model: str, base: Path) -> str:
    """A model that lies on this machine as an absolute path, since the daemon has a working folder of its own."""
    path = base / Path(model).expanduser()
    return str(path.absolute()) if path.exists() else model
