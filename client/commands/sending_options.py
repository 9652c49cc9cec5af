"""What commands that send a request let their user say of it."""

from __future__ import annotations

import click

from nnsight_hpc.wire.messages import PRIORITIES

NEEDS = click.option(
    "--needs", metavar="DURATION", help="How long it runs at least, as 10m: no worker with less left takes it."
)
PRIORITY = click.option(
    "--priority",
    type=click.IntRange(PRIORITIES[0], PRIORITIES[-1]),
    default=0,
    help="Of your own requests the larger goes first.  [default: 0]",
)
