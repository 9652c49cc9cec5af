"""``nnsight-hpc connect`` and ``disconnect``."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import click

from nnsight_hpc.client import config
from nnsight_hpc.client.app import App, command, note, pass_app
from nnsight_hpc.client.connection_share import detach, serve
from nnsight_hpc.client.connection_share import disconnect as end_sharing
from nnsight_hpc.wire.errors import InvalidInput

if TYPE_CHECKING:
    from nnsight_hpc.client.config import Cluster


@command()
@click.option("--background", is_flag=True, help="Return once logged in; `nnsight-hpc disconnect` ends it.")
@click.option("--ready", type=int, hidden=True, help="The pipe on which --background waits for its other half.")
@pass_app
def connect(app: App, background: bool, ready: int | None) -> int | None:
    """Log in once, for all later commands.

    Holds one SSH connection and lets later commands use it, until Ctrl-C: so a second factor is asked for once.
    """
    name, profile = _remote(app)
    if background:
        return _in_background(name)

    def logged_in() -> None:
        if ready is None:
            note(f"Connected to {name} ({profile.host}). Ctrl-C ends it.")
        else:
            detach()
            os.write(ready, b"+")
            os.close(ready)

    serve(name, profile, logged_in)
    return None


@command()
@pass_app
def disconnect(app: App) -> None:
    """End what `connect` opened."""
    name, profile = _remote(app)
    process = end_sharing(name, profile)
    app.answer({"ended": process}, lambda: print(f"Disconnected from {name}."))


def _remote(app: App) -> tuple[str, Cluster]:
    profiles = config.load()
    name = profiles.chosen(app.cluster)
    profile = profiles.find(name)
    if profile is None:
        raise InvalidInput(
            "the cluster 'local' is this machine: there is nothing to connect", next="name another: -c NAME"
        )
    return name, profile


def _in_background(name: str) -> int:
    """Start the same command as a process of its own, which may ask on this terminal until it is logged in."""
    reading, writing = os.pipe()
    command = [sys.executable, "-P", "-m", "nnsight_hpc.client", "-c", name, "connect", "--ready", str(writing)]
    process = subprocess.Popen(command, pass_fds=[writing])
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        if pipe.read(1):
            note(f"Connected to {name}. `nnsight-hpc -c {name} disconnect` ends it.")
            return 0
    return process.wait(30)  # it has said why
