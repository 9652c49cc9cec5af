"""A pool's resources as options of sbatch, each value checked."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

from nnsight_hpc.slurm.batch.checks import check_path, check_text
from nnsight_hpc.slurm.batch.marks import mark
from nnsight_hpc.wire.errors import InvalidInput
from nnsight_hpc.wire.names import check_name

if TYPE_CHECKING:
    from nnsight_hpc.wire.places import Places
    from nnsight_hpc.wire.pools import PoolSpec

_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<fields>\d+(?::\d+){0,2})\Z", re.ASCII)
_MEM = re.compile(r"(?P<number>\d+)(?P<unit>[KMGT]?)\Z", re.ASCII)
_UNITS = {"K": 1 << 10, "M": 1 << 20, "": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_MPI = re.compile(r"[A-Za-z0-9_]+\Z", re.ASCII)
_ARGUMENT = re.compile(r"--(?P<name>[a-z][a-z0-9-]*)(?:=.+)?\Z", re.DOTALL)

_KEYS = {
    **{key.replace("_", "-"): key for key in ("nodes", "gpus_per_node", "gres", "cpus_per_task", "mem", "time")},
    **{key: key for key in ("partition", "account", "qos", "constraint", "reservation")},
    "ntasks": "tp",
    "ntasks-per-node": "tp",
}
"""Options that have a key of their own in a pool."""

_OURS = (
    *(
        "array",
        "begin",
        "chdir",
        "clusters",
        "comment",
        "error",
        "export",
        "export-file",
        "help",
        "job-name",
        "no-requeue",
    ),
    *("open-mode", "output", "parsable", "quiet", "requeue", "signal", "test-only", "usage", "version", "wait", "wrap"),
)
"""Options that would break what nnsight-hpc does with a job: find it, read its log, drain it, start it in time."""


def sbatch_options(replica: str, spec: PoolSpec, places: Places, begin: float | None) -> dict[str, str | None]:
    """The options of a replica's job, by name; None is an option without a value. Raises `InvalidInput`.

    No environment travels from the login node (it has people's tokens); a node failure does not requeue the job, since
    the daemon starts another replica. (``--signal`` is not used: Slurm sends it up to a minute early, which is half of
    the time of a short job. The script has a timer of its own.)
    """
    time_limit(spec.time)
    folder = check_path(places.replica(check_name(replica, of="replica")))
    return {
        "job-name": f"nnsight-hpc-{check_name(spec.name, of='pool')}",
        "comment": mark(replica, places),
        "chdir": folder,
        "output": f"{folder}/log",
        "open-mode": "append",
        "export": "NONE",
        "no-requeue": None,
        "time": spec.time,
        "nodes": _count(spec.nodes, "nodes"),
        "ntasks": _count(spec.tp, "tp"),
        "ntasks-per-node": str(spec.ranks_per_node),
        **_resources(spec),
        **_placement(spec),
        **_begin(begin),
    }


def sbatch_arguments(spec: PoolSpec) -> list[str]:
    """The pool's raw ``sbatch_args``, checked: each ``--option`` or ``--option=value``, and none that is set elsewhere."""
    for argument in spec.sbatch_args:
        match = _ARGUMENT.match(check_text(argument, "sbatch_args"))
        if not match:
            raise InvalidInput(f"sbatch_args cannot have {argument!r}", next="write each one as --option=value")
        _check_free(match["name"])
    return list(spec.sbatch_args)


def time_limit(time: str) -> int:
    """A time limit of Slurm in seconds (sbatch(1), ``--time``); raises `InvalidInput`, for one of 0 (no limit) too."""
    match = _TIME.match(time)
    fields = [int(field) for field in match["fields"].split(":")] if match else []
    if match and match["days"]:  # days-hours[:minutes[:seconds]]
        hours, minutes, seconds = [int(match["days"]) * 24 + fields[0], *fields[1:], 0, 0][:3]
    else:  # minutes, minutes:seconds or hours:minutes:seconds
        hours, minutes, seconds = fields if len(fields) == 3 else [0, *fields, 0, 0][:3]
    limit = hours * 3600 + minutes * 60 + seconds
    if not limit:
        raise InvalidInput(
            f"time cannot be {time!r}",
            why="a pool's job needs a time limit, in one of Slurm's forms",
            next="write hours:minutes:seconds or days-hours:minutes:seconds, for example 12:00:00 or 1-12:00:00",
        )
    return limit


def farewell(limit: int) -> int:
    """How many seconds before its time limit (in seconds) a job drains by itself, so that it ends with success."""
    return min(120, limit // 8)


def memory_bytes(mem: str) -> int:
    """A pool's ``mem`` in bytes; without a unit Slurm takes it for MiB. 0 is all of a node's. Raises `InvalidInput`."""
    match = _matching(mem, "mem", _MEM, "Slurm's form, for example 64G; 0 is all of a node's memory")
    return int(match["number"]) * _UNITS[match["unit"]]


def check_mpi(mpi: str) -> str:
    return _matching(mpi, "mpi", _MPI, "auto, or a name that `srun --mpi=list` prints")[0]


def _resources(spec: PoolSpec) -> dict[str, str | None]:
    if spec.gpus_per_node and spec.gres and "gpu" in spec.gres:
        raise InvalidInput(
            "a pool has gpus_per_node or gres, not both",
            why=f"{spec.gpus_per_node} and {spec.gres!r}",
            next="remove one",
        )
    options: dict[str, str | None] = {}
    if spec.gpus_per_node:
        options["gpus-per-node"] = _count(spec.gpus_per_node, "gpus_per_node")
    if spec.gres is not None:
        options["gres"] = check_text(spec.gres, "gres")
    if spec.cpus_per_task is not None:
        options["cpus-per-task"] = _count(spec.cpus_per_task, "cpus_per_task")
    if spec.mem is not None:
        memory_bytes(spec.mem)
        options["mem"] = spec.mem
    elif "--exclusive" in spec.sbatch_args:
        options["mem"] = "0"  # a node of one's own brings all its CPUs and GPUs, but not its memory
    return options


def _placement(spec: PoolSpec) -> dict[str, str | None]:
    values = {key: getattr(spec, key) for key in ("partition", "account", "qos", "constraint", "reservation")}
    return {key: check_text(value, key) for key, value in values.items() if value is not None}


def _begin(begin: float | None) -> dict[str, str | None]:
    """In seconds from now, since sbatch reads a time of day as that of the host where it runs."""
    seconds = 0 if begin is None else round(begin - time.time())
    return {"begin": f"now+{seconds}"} if seconds > 0 else {}


def _check_free(name: str) -> None:
    """Refuse options that are set elsewhere, abbreviated ones too: sbatch takes ``--outp`` for ``--output``."""
    for option in (*_KEYS, *_OURS):
        if option.startswith(name):
            raise InvalidInput(
                f"sbatch_args cannot have --{name}",
                why=f"nnsight-hpc sets --{option} itself",
                next=f"use the pool's key {_KEYS[option]}" if option in _KEYS else "leave it out",
            )


def _count(value: int, key: str) -> str:
    if value < 1:
        raise InvalidInput(f"{key} cannot be {value}", next="use 1 or more")
    return str(value)


def _matching(value: str, key: str, form: re.Pattern[str], what: str) -> re.Match[str]:
    match = form.match(value)
    if not match:
        raise InvalidInput(f"{key} cannot be {value!r}", next=f"use {what}")
    return match
