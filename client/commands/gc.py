"""``nnsight-hpc gc``."""

from __future__ import annotations

import shutil
from pathlib import Path

import click
import msgspec

from nnsight_hpc.client.app import App, command, pass_app
from nnsight_hpc.storage.leftovers import half_fetched
from nnsight_hpc.wire.messages import decode
from nnsight_hpc.wire.pools import Garbage

_ANSWER = 600.0
"""Seconds for an answer that cancels jobs, or removes many folders of a slow file system."""


@command()
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option(
    "--in",
    "folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path(),
    help="The folder here that is searched for half fetched datasets.  [default: this one]",
)
@pass_app
def gc(app: App, dry_run: bool, yes: bool, folder: Path) -> None:
    """Cancel jobs that belong to no pool, and remove what is left over.

    Jobs are found through Slurm itself, also those of a daemon whose state was lost. Folders on the cluster are those of
    workers that ended more than a week ago, but for each pool's newest, of plans that were never used, and of datasets
    that were half made or half removed, or are incomplete and of no known request. Here, they are half fetched datasets.
    """
    client, here = app.client(), half_fetched(folder.absolute())
    found = decode(client.call("POST", "/v1/gc?dry=1", timeout=_ANSWER), Garbage)
    lines = [*(f"job {job}" for job in found.jobs), *found.folders, *map(str, here)]
    if lines and not dry_run:
        if not yes:
            click.confirm("\n".join([*lines, "Cancel and remove this?"]), abort=True, err=True)
        found = decode(client.call("POST", "/v1/gc?dry=0", timeout=_ANSWER), Garbage)
        for path in here:
            shutil.rmtree(path)
    did = [_did(dry_run, "cancel", "Cancelled", f"job {job}") for job in found.jobs]
    did += [_did(dry_run, "remove", "Removed", path) for path in (*found.folders, *map(str, here))]
    everything = {**msgspec.to_builtins(found), "here": [str(path) for path in here]}
    app.answer(everything, lambda: print("\n".join(did) or "Nothing is left over."))


def _did(dry_run: bool, would: str, done: str, what: str) -> str:
    return f"Would {would} {what}" if dry_run else f"{done} {what}"
