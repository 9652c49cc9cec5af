"""``nnsight-hpc up``, ``plan`` and ``resume``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
import msgspec

from nnsight_hpc.client.app import App, command, note, pass_app
from nnsight_hpc.client.commands.pool_options import described, pool_options
from nnsight_hpc.client.completion import pool_names
from nnsight_hpc.client.waiting import wait_until_ready
from nnsight_hpc.client.words import alive, coming, replica_words, serving
from nnsight_hpc.wire.errors import NotFound
from nnsight_hpc.wire.messages import decode
from nnsight_hpc.wire.names import check_name
from nnsight_hpc.wire.pools import Plan, PoolStatus
from nnsight_hpc.wire.states import ReplicaState

if TYPE_CHECKING:
    from pathlib import Path

    from nnsight_hpc.wire.http import HttpClient

_ANSWER = 120.0
"""Seconds for an answer that asks Slurm several things, each of which may take its time."""


@command()
@click.argument("name", shell_complete=pool_names)
@pool_options
@click.option("--wait", is_flag=True, help="Return when the model serves.")
@pass_app
def up(app: App, /, name: str, wait: bool, file: Path | None, **options: Any) -> None:
    """Keep a model resident, or change how it is.

    NAME is the pool's. It is described by [pool.NAME] in the configuration, or in --file, and by options, which count more;
    workers are submitted until it has as many replicas as asked for.
    """
    keys = described(app, name, file, options)
    client = app.client()
    before = _find(client, name) if wait else None
    pool = client.put(f"/v1/pools/{name}", msgspec.json.encode(keys), PoolStatus, timeout=_ANSWER)
    if wait:
        pool = wait_until_ready(client, pool, known=_not_awaited(before, pool))
    app.answer(pool, lambda: _print(app, pool))


@command()
@click.argument("name", shell_complete=pool_names)
@pool_options
@pass_app
def plan(app: App, /, name: str, file: Path | None, **options: Any) -> None:
    """Print the job that `up` would submit.

    The script alone is on stdout, so that `nnsight-hpc plan NAME > job.sh` keeps it. What it asks for is checked against what
    Slurm has, and Slurm's own estimate of the start is asked for; nothing is queued. Submitted by hand with `sbatch`, the
    script gives a worker that joins the pool.
    """
    keys = described(app, name, file, options)
    answer = app.client().call("POST", f"/v1/pools/{name}/plan", msgspec.json.encode(keys), timeout=_ANSWER)
    found = decode(answer, Plan)
    app.answer(found, lambda: _print_plan(found))


@command()
@click.argument("name", shell_complete=pool_names)
@pass_app
def resume(app: App, name: str) -> None:
    """Start a pool's workers again, after failed starts have held it."""
    client = app.client(pool=check_name(name, of="pool"))
    pool = decode(client.call("POST", f"/v1/pools/{name}/resume", timeout=_ANSWER), PoolStatus)
    app.answer(pool, lambda: _print(app, pool))


def _find(client: HttpClient, name: str) -> PoolStatus | None:
    try:
        return client.get(f"/v1/pools/{name}", PoolStatus)
    except NotFound:
        return None


def _not_awaited(before: PoolStatus | None, pool: PoolStatus) -> frozenset[str]:
    """Replicas whose end is no failure of what is asked for now: they have ended, are leaving, or may be replaced."""
    if before is None:
        return frozenset()
    changes = before.spec != pool.spec or before.down
    leaving = (ReplicaState.DRAINING, ReplicaState.ENDED)
    return frozenset(replica.id for replica in before.replicas if changes or replica.state in leaving)


def _print(app: App, pool: PoolStatus) -> None:
    """A line for each replica, and what to type next where none serves."""
    name = pool.spec.name
    for words in [replica_words(one) for one in alive(pool)] or [pool.note or "its first worker is being submitted"]:
        print(f"Pool {name}: {words}")
    if not serving(pool):
        note(f"{app.program} status --watch, or {app.program} explain {name}")


def _print_plan(found: Plan) -> None:
    print(found.script, end="" if found.script.endswith("\n") else "\n")
    for each in found.notes:
        note(f"Note: {each}")
    if found.starts is not None:
        note(f"Expected start: {coming(found.starts)}.")
    note(f"The script lies at {found.path}; submitted by hand, it gives a worker that joins the pool.")
