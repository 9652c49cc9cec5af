"""``nnsight-hpc bridge``."""

from __future__ import annotations

import click

from nnsight_hpc.client.app import command
from nnsight_hpc.client.bridge import run


@command()
@click.option(
    "--executor", type=click.Choice(["slurm", "embedded"]), default="slurm", show_default=True, help="Which daemon."
)
@click.option("--no-start", is_flag=True, help="Fail where no daemon runs.")
def bridge(executor: str, no_start: bool) -> int:
    """Relay stdin and stdout to the daemon (what ssh runs)."""
    return run(executor, start=not no_start)
