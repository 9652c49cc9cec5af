"""``nnsight-hpc doctor``."""

from __future__ import annotations

import sys
import textwrap
from typing import TYPE_CHECKING

import click

from nnsight_hpc.client.app import App, command, pass_app
from nnsight_hpc.client.doctor import look
from nnsight_hpc.wire.checks import Finding
from nnsight_hpc.wire.errors import from_report

if TYPE_CHECKING:
    from nnsight_hpc.wire.checks import Check

_COLOURS = {
    Finding.WORKS: "green",
    Finding.DOUBTFUL: "yellow",
    Finding.BROKEN: "red",
    Finding.SKIPPED: "bright_black",
}


@command()
@pass_app
def doctor(app: App) -> int:
    """Check the whole chain, from SSH to a forward on a worker.

    Says which link is broken, and how to mend it. The exit code is that of the first broken link's error, or 0.
    """
    checks = []
    for check in look(app.cluster):
        checks.append(check)
        if not app.json:
            _print(check)
    app.answer(checks, lambda: None)
    broken = [from_report(check.error) for check in checks if check.error and check.finding is Finding.BROKEN]
    return broken[0].exit_code if broken else 0


def _print(check: Check) -> None:
    finding = f"{check.finding:<9}"
    shown = click.style(finding, fg=_COLOURS[check.finding]) if sys.stdout.isatty() else finding
    print(f"{shown} {check.link}: {check.found}")
    if error := check.error:
        for label, text in (("where", error.where), ("why", error.why), ("next", error.next)):
            if text:
                print(textwrap.indent(f"{label}: {text}", " " * 12))
    sys.stdout.flush()
