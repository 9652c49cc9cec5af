"""``nnsight-hpc down``."""

from __future__ import annotations

import click

from nnsight_hpc.client.app import App, command, pass_app
from nnsight_hpc.client.completion import pool_names
from nnsight_hpc.client.waiting import wait_until_all_empty, wait_until_empty, workers
from nnsight_hpc.client.words import alive
from nnsight_hpc.wire.errors import InvalidInput
from nnsight_hpc.wire.messages import decode
from nnsight_hpc.wire.names import check_name
from nnsight_hpc.wire.pools import Garbage, PoolStatus, ReplicaStatus

_ANSWER = 600.0
"""Seconds for an answer that cancels jobs, or removes many folders of a slow file system."""


@command()
@click.argument("name", required=False, shell_complete=pool_names)
@click.option("--all", "everything", is_flag=True, help="All pools, and every job of ours that Slurm knows.")
@click.option("--wait", is_flag=True, help="Return when all workers have ended.")
@pass_app
def down(app: App, name: str | None, everything: bool, wait: bool) -> None:
    """End a pool's workers; what runs has a minute.

    What waits for the pool fails. A dump stops at once, and goes on when it is started again on a pool with the same model.
    """
    if everything == (name is not None):
        raise InvalidInput("give the name of a pool, or --all", next="nnsight-hpc status lists the pools")
    if name is None:
        _all_down(app, wait=wait)
    else:
        _one_down(app, check_name(name, of="pool"), wait=wait)


def _one_down(app: App, name: str, *, wait: bool) -> None:
    client = app.client(pool=name, start=False)
    pool = decode(client.call("DELETE", f"/v1/pools/{name}"), PoolStatus)
    if wait:
        pool = wait_until_empty(client, pool)
    app.answer(pool, lambda: print(f"Pool {name}: {_left_words(alive(pool))}."))


def _all_down(app: App, *, wait: bool) -> None:
    """The daemon is started where none runs: Slurm knows jobs of ours also when its state is gone."""
    client = app.client()
    strays = decode(client.call("DELETE", "/v1/pools", timeout=_ANSWER), Garbage)
    left = wait_until_all_empty(client) if wait else workers(client)

    def tell() -> None:
        _print_each("Cancelled job", strays.jobs)
        print(f"All pools: {_left_words(left)}.")

    app.answer(strays, tell)


def _left_words(left: list[ReplicaStatus]) -> str:
    if not left:
        return "no worker is left"
    return "1 worker finishes and ends" if len(left) == 1 else f"{len(left)} workers finish and end"


def _print_each(what: str, things: tuple[str, ...]) -> None:
    for thing in things:
        print(f"{what} {thing}")
