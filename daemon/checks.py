"""What the daemon finds when it looks at itself and at what it needs: its home, the batch system, the pools."""

from __future__ import annotations

import asyncio
import shutil
import time
from typing import TYPE_CHECKING

import psutil

from nnsight_hpc.daemon.lease import server_time
from nnsight_hpc.daemon.site import read_site
from nnsight_hpc.daemon.words import duration
from nnsight_hpc.wire.checks import Check, Doubt, Finding, checked
from nnsight_hpc.wire.errors import HpcError, Unreachable

if TYPE_CHECKING:
    from pathlib import Path

    from nnsight_hpc.daemon.parts import Parts

_LITTLE = 1 << 30
"""Bytes; a home with less free space will not do for long."""
_APART = 5.0
"""Seconds that the clocks of this host and of the file server may differ."""
_OF_ONE_HOST = frozenset({"tmpfs", "ramfs", "overlay"})
"""File systems that other hosts usually cannot see."""


async def look(parts: Parts) -> list[Check]:
    """All checks of the daemon, in the order in which they build on each other; none of them raises."""
    home, slurm = parts.config.places.home, parts.hello.executor == "slurm"
    batch = "Slurm" if slurm else "processes on this machine"
    unseen = slurm and not any(one.serves and one.status.host != parts.hello.host for one in parts.pools.replicas())
    return [
        await asyncio.to_thread(checked, "home", lambda: _home(home, unseen=unseen)),
        await asyncio.to_thread(checked, "site file", _site),
        await asyncio.to_thread(checked, "batch system", lambda: f"{batch}: {_jobs(parts)}"),
        *(_pool(parts, name) for name in parts.pools.names()),
    ]


def _home(home: Path, *, unseen: bool) -> str:
    """Whether files can be written there, by clocks that agree, and other hosts can see them.

    Parameters
    ----------
    unseen
        Other hosts have to see it, and no worker on one of them has shown yet that it does.
    """
    if (apart := _apart(home)) > _APART:
        raise Doubt(
            f"the clocks of this host and of its file server differ by {duration(apart)}",
            where=str(home),
            next="ask those who look after the cluster to set them",
        )
    if (free := shutil.disk_usage(home).free) < _LITTLE:
        raise Doubt(
            f"only {free >> 20} MiB are free in the daemon's home",
            where=str(home),
            next="remove what nobody needs (`nnsight-hpc gc`), or ask for more",
        )
    kind = _file_system(home)
    if unseen and kind in _OF_ONE_HOST:
        raise Doubt(
            "compute nodes will hardly see the daemon's home",
            where=str(home),
            why=f"its file system is {kind}, which usually belongs to one host alone",
            next="name a folder on a shared file system with NNSIGHT_HPC_HOME, and start the daemon again",
        )
    return f"{home} can be written, {free >> 30} GiB are free; its file system is {kind}"


def _apart(home: Path) -> float:
    """Seconds between the file server's clock and ours; raises `HpcError` where nothing can be written there."""
    begun = time.time()
    try:
        theirs = server_time(home)
        return max(begun - theirs, theirs - time.time())  # whatever happened in between, it was within that time
    except OSError as error:
        raise HpcError(
            "the daemon's home cannot be written",
            where=str(home),
            why=error.strerror or str(error),
            next="free space there, or name another folder with NNSIGHT_HPC_HOME and start the daemon again",
        ) from error


def _file_system(path: Path) -> str:
    """The type of the file system that `path` lies on, as proc(5) names it."""
    mounts = {part.mountpoint: part.fstype for part in psutil.disk_partitions(all=True)}
    return next((mounts[str(one)] for one in (path, *path.parents) if str(one) in mounts), "unknown")


def _site() -> str:
    site = read_site()
    return f"{site.path} is in order" if site.path else "there is none"


def _jobs(parts: Parts) -> str:
    """How many jobs of this home it knows; raises what stands in the way of asking it."""
    survey = parts.executor.survey([], parts.config.places)
    if survey.doubt:
        raise Unreachable(
            "the batch system gives no certain answer",
            why=survey.doubt,
            next="run `squeue --me` on this host; ask those who look after the cluster when it fails too",
        )
    return f"{len(survey.ours)} jobs of this daemon"


def _pool(parts: Parts, name: str) -> Check:
    """Whether the pool serves, or why not."""
    link = f"pool {name}"
    status = parts.pools.status(name, parts.requests.demand(name).queued)
    serving = [f"{one.id} on {one.host or 'an unknown host'}" for one in status.replicas if one.state.serves]
    if serving:
        return Check(link=link, finding=Finding.WORKS, found=f"served by {', '.join(serving)}")
    if status.held is not None:
        return Check(link=link, finding=Finding.BROKEN, found=status.held.what, error=status.held)
    return Check(link=link, finding=Finding.SKIPPED, found=status.note or "no replica serves")
