"""``nnsight-hpc status``."""

from __future__ import annotations

import click

from nnsight_hpc.client.app import App, command, pass_app
from nnsight_hpc.client.overview import overview
from nnsight_hpc.client.tables import print_blocks
from nnsight_hpc.wire.pools import Status


@command()
@click.option("-w", "--watch", "watched", is_flag=True, help="Go on showing it as it changes, until Ctrl-C.")
@pass_app
def status(app: App, watched: bool) -> None:
    """Show the daemon, its pools and its requests."""
    client = app.client(start=False)
    if watched:
        from nnsight_hpc.client.watching import watch  # noqa: PLC0415 - a single look does not need it

        watch(client, as_json=app.json)
        return
    found = client.get("/v1/status", Status)
    app.answer(found, lambda: print_blocks(overview(found)))
