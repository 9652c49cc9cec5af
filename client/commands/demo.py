"""``nnsight-hpc demo``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from nnsight_hpc.client.app import App, command, pass_app


@command()
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("nnsight-hpc-demo"),
    show_default=True,
    help="Where everything goes; a folder of an earlier demonstration is made anew.",
)
@click.option("--keep", is_flag=True, help="Leave the daemon and the pool running.")
@pass_app
def demo(app: App, out: Path, keep: bool) -> None:
    """Show everything on this machine, with a small model."""
    from nnsight_hpc.client.demo import run_demo  # noqa: PLC0415 - `--help` does not need it

    # As JSON, stdout holds the result alone.
    done = run_demo(out, keep=keep, narration=sys.stderr if app.json else sys.stdout)
    app.answer(done, lambda: None)
