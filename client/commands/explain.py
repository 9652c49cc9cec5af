"""``nnsight-hpc explain``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from nnsight_hpc.client.app import App, command, pass_app
from nnsight_hpc.client.completion import pools_and_requests
from nnsight_hpc.client.tables import Table, moment, print_blocks
from nnsight_hpc.client.words import serving, state_words
from nnsight_hpc.wire.errors import NotFound
from nnsight_hpc.wire.messages import Story
from nnsight_hpc.wire.names import check_name, is_request_id
from nnsight_hpc.wire.pools import PoolStatus

if TYPE_CHECKING:
    from nnsight_hpc.wire.http import HttpClient


@command()
@click.argument("name", metavar="POOL|ID", shell_complete=pools_and_requests)
@pass_app
def explain(app: App, name: str) -> None:
    """Tell the story of a pool or a request, with times."""
    if is_request_id(name):
        story = app.client(start=False).get(f"/v1/requests/{name}/story", Story)
        app.answer(story, lambda: print_blocks([_events(story), f"Now: {story.now}"]))
    else:
        client = app.client(pool=check_name(name, of="pool"), start=False)
        story = client.get(f"/v1/pools/{name}/story", Story)
        app.answer(story, lambda: print_blocks([_events(story), _last_lines(client, name), f"Now: {story.now}"]))


def _events(story: Story) -> Table:
    rows = [[moment(event.time), event.replica, event.text] for event in story.events]
    return Table(["time", "replica", "what happened"], rows, empty="Nothing is known to have happened.")


def _last_lines(client: HttpClient, name: str) -> str:
    """The end of the log of the replica that failed last, while none serves."""
    try:
        pool = client.get(f"/v1/pools/{name}", PoolStatus)
    except NotFound:  # its story outlives it
        return ""
    failed = [replica for replica in pool.replicas if replica.tail]
    if serving(pool) or not failed:
        return ""
    return f"The last lines of the log of {failed[-1].id}, {state_words(failed[-1])}:\n{failed[-1].tail}"
