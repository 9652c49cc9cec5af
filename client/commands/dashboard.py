"""``nnsight-hpc dashboard``."""

from __future__ import annotations

import html
import os
import sys
import webbrowser
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from nnsight_hpc.client.app import App, command, note, pass_app
from nnsight_hpc.wire.errors import Conflict
from nnsight_hpc.wire.files import write_atomically
from nnsight_hpc.wire.places import runtime_folder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@command()
@click.option("--port", type=click.IntRange(1, 65535), help="The port on this machine; else a free one.")
@click.option("--no-browser", is_flag=True, help="Open no browser, print the address only.")
@pass_app
def dashboard(app: App, port: int | None, no_browser: bool) -> None:
    """Show pools, queue and requests in a browser, live, until Ctrl-C.

    The page comes from the daemon, over the same connection as all else, through a port of this machine. Its address has
    a secret in it, and ends with the command.
    """
    import asyncio  # noqa: PLC0415 - the listener is slow to load

    from nnsight_hpc.client.dashboard import Feed, serve  # noqa: PLC0415

    feed = Feed(app.client(start=False))
    feed.load()
    with _way_there() as way:

        def ready(address: str) -> None:
            app.answer({"url": address}, lambda: print(address))
            sys.stdout.flush()
            note("Ctrl-C ends it.")
            if not no_browser and _has_screen():
                write_atomically(way, _REDIRECT.format(html.escape(address)).encode())
                webbrowser.open(way.as_uri())

        try:
            asyncio.run(serve(feed, port or 0, ready))
        except OSError as error:
            raise Conflict(
                f"nothing can listen on port {port} of this machine", why=error.strerror or "", next="another --port"
            ) from error


@contextmanager
def _way_there() -> Iterator[Path]:
    """A file of this user's that leads a browser to an address which nobody is to read among the arguments of processes."""
    path = runtime_folder() / f"dashboard-{os.getpid()}.html"
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


_REDIRECT = '<!doctype html><meta http-equiv="refresh" content="0; url={0}"><a href="{0}">The dashboard</a>\n'


def _has_screen() -> bool:
    """Whether a browser would have a window; one in the terminal would take that over."""
    return sys.platform == "darwin" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
