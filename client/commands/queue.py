"""``nnsight-hpc queue`` and ``show``."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from nnsight_hpc.client.app import App, command, pass_app
from nnsight_hpc.client.completion import request_ids
from nnsight_hpc.client.overview import requests_blocks
from nnsight_hpc.client.tables import Table, duration, moment, print_blocks, size
from nnsight_hpc.client.words import dump_words, request_words
from nnsight_hpc.wire.errors import from_report
from nnsight_hpc.wire.messages import LISTED, MOST_LISTED, RequestStatus
from nnsight_hpc.wire.names import check_request_id

if TYPE_CHECKING:
    from collections.abc import Iterable


@command()
@click.option("--all", "everything", is_flag=True, help="Also the latest that have ended.")
@click.option(
    "--limit",
    type=click.IntRange(1, MOST_LISTED),
    default=LISTED,
    help=f"So many that run, that wait and that have ended.  [default: {LISTED}]",
)
@pass_app
def queue(app: App, everything: bool, limit: int) -> None:
    """List the requests that run and those that wait, in the order in which they go."""
    known = app.client(start=False).get(f"/v1/requests?limit={limit}", list[RequestStatus])
    found = _in_order(one for one in known if everything or not one.state.ended)
    app.answer(found, lambda: print_blocks(requests_blocks(found, limit=limit, empty="No requests.")))


@command()
@click.argument("request", metavar="ID", shell_complete=request_ids)
@pass_app
def show(app: App, request: str) -> None:
    """Show how a request stands, and how long it was in each state."""
    status = app.client(start=False).get(f"/v1/requests/{check_request_id(request)}", RequestStatus)
    app.answer(status, lambda: print_blocks(_blocks(status)))


def _in_order(requests: Iterable[RequestStatus]) -> list[RequestStatus]:
    """Those that have ended, those that a worker has, and those that wait: these pool by pool, the next first."""

    def place(status: RequestStatus) -> tuple[bool, bool, str, int]:
        waits = status.position is not None
        return not status.state.ended, waits, status.pool if waits else "", status.position or 0

    return sorted(requests, key=place)


def _blocks(status: RequestStatus) -> list[str | Table]:
    head = f"Request {status.id}, a {status.kind} of {status.user}: {request_words(status)}"
    return [head, _states(status), _outcome(status)]


def _states(status: RequestStatus) -> Table:
    """Each state that it has been in, by time, and how long it stayed there; in what it is in now, until now."""
    entered = sorted(status.times.items(), key=lambda entry: entry[1])
    left = [when for _, when in entered[1:]] + [time.time()]
    stays = [duration(end - begin) for (_, begin), end in zip(entered, left, strict=True)]
    if status.state.ended and stays:
        stays[-1] = ""
    rows = [[state.lower(), moment(when), stay] for (state, when), stay in zip(entered, stays, strict=True)]
    return Table(["state", "since", "for"], rows)


def _outcome(status: RequestStatus) -> str:
    """What came of it so far."""
    if status.error is not None:
        return str(from_report(status.error))
    if status.progress is not None:
        return dump_words(status.progress)
    return f"Result: {size(status.result_bytes)}" if status.result_bytes else ""
