"""``nnsight-hpc logs``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import click
import msgspec

from nnsight_hpc.client.app import App, command, note, pass_app
from nnsight_hpc.client.completion import pools_and_requests
from nnsight_hpc.client.patience import WHILE_WAITING
from nnsight_hpc.client.waiting import LONG_POLL, messages
from nnsight_hpc.wire.errors import InvalidInput
from nnsight_hpc.wire.names import check_name, is_request_id
from nnsight_hpc.wire.pools import LogPart

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nnsight_hpc.wire.http import HttpClient
    from nnsight_hpc.wire.messages import LogLine


@command()
@click.argument("name", metavar="POOL|ID", shell_complete=pools_and_requests)
@click.option("--lines", type=click.IntRange(1), help="How many, from a pool's log's end.  [default: 50]")
@click.option("--replica", metavar="ID", help="One of the pool's replicas; else the newest.")
@click.option("--rank", type=click.IntRange(0), help="One of the replica's MPI ranks; else all.")
@click.option("-f", "--follow", is_flag=True, help="Go on until the replica, or the request, has ended.")
@pass_app
def logs(app: App, /, name: str, follow: bool, **options: Any) -> None:
    """Show a pool's newest log, or what a request says.

    A request says what its `log` and `print` say, and all of it is shown.
    """
    given = {key: value for key, value in options.items() if value is not None}
    if not is_request_id(name):
        _pool_log(app, check_name(name, of="pool"), given, follow=follow)
    elif given:
        raise InvalidInput(f"{name} is a request, and has no --{' --'.join(given)}")
    else:
        _request_log(app, name, follow=follow)


def _pool_log(app: App, pool: str, given: dict[str, Any], *, follow: bool) -> None:
    text = ""
    for part in _parts(app.client(pool=pool, start=False), pool, given, follow=follow):
        text += part.text
        if not app.json:
            print(part.text, end="", flush=True)
    if follow and not app.json:
        note(f"Replica {part.replica} has ended.")
    app.answer(msgspec.structs.replace(part, text=text), lambda: None)


def _parts(client: HttpClient, pool: str, given: dict[str, Any], *, follow: bool) -> Iterator[LogPart]:
    """The last lines of a replica's log, and what comes, as it comes, until it ends."""
    query = given
    while True:
        part = client.get(f"/v1/pools/{pool}/log?{urlencode(query)}", LogPart, timeout=LONG_POLL + 30)
        yield part
        if part.ended or not follow:
            return
        query = given | {"from": part.next, "wait": LONG_POLL, "replica": part.replica}


def _request_log(app: App, request: str, *, follow: bool) -> None:
    client = app.client(start=False, patience=WHILE_WAITING if follow else 0.0)
    said: list[LogLine] = []
    for log in messages(client, request, wait=follow):
        said += log.lines
        if not app.json:
            print(*(line.text + "\n" for line in log.lines), sep="", end="", flush=True)
    app.answer({"request": request, "log": said}, lambda: None)
