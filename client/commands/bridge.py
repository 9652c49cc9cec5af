"""``nnsight-hpc bridge``."""

from __future__ import annotations

import click

from nnsight_hpc.client.app import command
from nnsight_hpc.client.bridge import run


@command()
@click.option(
    "--executor", type=click.Choice(["slurm", "embedded"]), default="slurm", show_default=True, help="Which daemon."
)
@click.option("--owner", metavar="USER", help="Whose daemon, where it is shared.  [default: your own]")
@click.option("--no-start", is_flag=True, help="Fail where no daemon runs.")
@click.option("--stay", is_flag=True, help="Do not go on to another login node, where the daemon runs there.")
@click.option("--files", is_flag=True, help="Read your own datasets here, without the daemon.")
def bridge(executor: str, owner: str | None, no_start: bool, stay: bool, files: bool) -> int:
    """Relay stdin and stdout to the daemon (what ssh runs)."""
    if files:
        from nnsight_hpc.client.files_bridge import serve_files  # noqa: PLC0415 - not needed to relay

        return serve_files(executor)
    return run(executor, owner=owner, start=not no_start, stay=stay)
