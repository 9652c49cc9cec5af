"""``status --watch``: the same overview again and again, live on a terminal."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec

from nnsight_hpc.client.overview import overview
from nnsight_hpc.client.tables import as_text, rich_blocks
from nnsight_hpc.wire.errors import NotFound, Unreachable
from nnsight_hpc.wire.pools import Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from nnsight_hpc.client.tables import Table
    from nnsight_hpc.wire.http import HttpClient

EVERY = 2.0
"""Seconds between two looks: as often as a person reads, and cheap for a login node."""


def watch(client: HttpClient, *, as_json: bool) -> None:
    """Show the daemon's state until Ctrl-C, which is how it ends; a daemon that goes is waited for.

    On a terminal the view changes in place; elsewhere it is printed when it has changed, with `as_json` as one line.
    """
    status, trouble = client.get("/v1/status", Status), ""
    try:
        with _screen() if sys.stdout.isatty() and not as_json else _printer(as_json=as_json) as show:
            while True:
                show(status, trouble)
                time.sleep(EVERY)
                try:
                    status, trouble = client.get("/v1/status", Status), ""
                except (Unreachable, NotFound) as error:
                    trouble = f"{error.what}; this is what was last known of it"
    except KeyboardInterrupt:
        return


def _blocks(status: Status, trouble: str) -> list[str | Table]:
    return [*overview(status), *([trouble] if trouble else [])]


@contextmanager
def _screen() -> Iterator[Callable[[Status, str], None]]:
    from rich.live import Live  # noqa: PLC0415 - only a terminal needs it

    with Live(auto_refresh=False) as live:
        yield lambda status, trouble: live.update(rich_blocks(_blocks(status, trouble)), refresh=True)


@contextmanager
def _printer(*, as_json: bool) -> Iterator[Callable[[Status, str], None]]:
    last = ""

    def show(status: Status, trouble: str) -> None:
        nonlocal last
        text = msgspec.json.encode(status).decode() if as_json else as_text(_blocks(status, trouble)) + "\n"
        if text != last:
            print(text, flush=True)
        last = text

    yield show
