"""``nnsight-hpc daemon``."""

from __future__ import annotations

import time

import click

from nnsight_hpc.client import config
from nnsight_hpc.client.app import App, HpcGroup, note, pass_app
from nnsight_hpc.client.config import LOCAL
from nnsight_hpc.client.launch import STOP_TIMEOUT, log_tail, wait_until_gone
from nnsight_hpc.client.overview import daemon_words
from nnsight_hpc.wire.errors import HpcError, NotFound, Unreachable
from nnsight_hpc.wire.messages import Hello
from nnsight_hpc.wire.places import places

_WORKERS_TIMEOUT = 120.0
"""Seconds besides: the daemon lets workers finish for a minute, and gives their jobs half a minute to end after that."""


@click.group(cls=HpcGroup)
def daemon() -> None:
    """Start, stop and look at the daemon."""


@daemon.command()
@pass_app
def start(app: App) -> None:
    """Start it where none runs (other commands do so by themselves)."""
    _say(app, start=True)


@daemon.command()
@pass_app
def status(app: App) -> None:
    """Show it; exit code 4 where none runs."""
    _say(app, start=False)


@daemon.command()
@click.option("--workers", is_flag=True, help="End all pools' workers first, and wait for their end.")
@pass_app
def stop(app: App, workers: bool) -> None:
    """Stop it; workers go on, and a new daemon finds them."""
    client = app.client(start=False)
    hello = client.get("/v1/hello", Hello)
    client.call("POST", f"/v1/stop?workers={int(workers)}")
    client.close()
    if workers:
        note("Waits for the workers to finish what they run, or to be ended after a minute.")
    if not _wait_until_stopped(app, hello, STOP_TIMEOUT + workers * _WORKERS_TIMEOUT):
        raise Unreachable(f"the daemon, process {hello.pid}, does not end", where=hello.host)
    app.answer(hello, lambda: print(f"Stopped the daemon on {hello.host}, process {hello.pid}."))


@daemon.command()
@click.option("--lines", type=click.IntRange(1), default=100, show_default=True, help="How many, from the end.")
@pass_app
def logs(app: App, lines: int) -> None:
    """Show its log, on this machine also when it does not run."""
    try:
        text = app.client(start=False).call("GET", f"/v1/log?lines={lines}").decode("utf-8", "replace").rstrip("\n")
    except NotFound:
        text = log_tail(places("embedded"), lines=lines) if _is_local(app) else ""
        if not text:
            raise
    app.answer({"log": text}, lambda: print(text))


def _say(app: App, *, start: bool) -> None:
    hello = app.client(start=start).get("/v1/hello", Hello)
    app.answer(hello, lambda: print(daemon_words(hello)))


def _wait_until_stopped(app: App, hello: Hello, seconds: float) -> bool:
    """False when it still answers (on this machine: when its process is still there) after so long."""
    if _is_local(app):
        return wait_until_gone(hello.pid, seconds)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if app.client(start=False).get("/v1/hello", Hello).epoch != hello.epoch:
                return True
        except HpcError:
            return True
        time.sleep(1)
    return False


def _is_local(app: App) -> bool:
    return config.load().chosen(app.cluster) == LOCAL
