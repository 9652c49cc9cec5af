"""``nnsight-hpc cluster``: the profiles."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from nnsight_hpc.client import config
from nnsight_hpc.client.app import App, HpcGroup, pass_app
from nnsight_hpc.client.config import LOCAL, Cluster
from nnsight_hpc.client.tables import print_table
from nnsight_hpc.wire.errors import InvalidInput


@click.group(cls=HpcGroup)
def cluster() -> None:
    """Add, list and remove clusters."""


@cluster.command("add")
@click.argument("name")
@click.argument("host", metavar="USER@HOST")
@click.option("--port", type=click.IntRange(1, 65535), help="The SSH port, where ssh's configuration does not say it.")
@click.option("--identity-file", metavar="FILE", help="A private key to offer first.")
@click.option(
    "--transport",
    type=click.Choice(["paramiko", "openssh"]),
    default="paramiko",
    show_default=True,
    help="openssh: the system's ssh, for FIDO keys, GSSAPI and all that its configuration can say.",
)
@click.option("--command", metavar="COMMAND", help="How a shell there starts the program.  [default: nnsight-hpc]")
@click.option("--owner", metavar="USER", help="Whose daemon to use there, when it is shared.  [default: your own]")
@click.option("--known-hosts", metavar="FILE", help="A file with the host's key, besides ~/.ssh/known_hosts.")
@click.option("--default", is_flag=True, help="Use this cluster when none is named.")
@pass_app
def add(
    app: App,
    *,
    name: str,
    host: str,
    port: int | None,
    identity_file: str | None,
    transport: str,
    command: str | None,
    owner: str | None,
    known_hosts: str | None,
    default: bool,
) -> None:
    """Add the cluster NAME, whose login node is USER@HOST (or a Host of ~/.ssh/config)."""
    if not host or host.startswith("-") or any(character.isspace() for character in host):
        raise InvalidInput(f"{host!r} is not a host", next="give user@host")
    given = {
        "host": host,
        "port": port,
        "identity_file": _absolute(identity_file),
        "transport": transport,
        "command": command,
        "owner": owner,
        "known_hosts": _absolute(known_hosts),
    }
    profile = msgspec.convert({key: value for key, value in given.items() if value is not None}, Cluster)
    path = config.add(name, profile, default=default)
    following = "status" if owner else "daemon start"
    app.answer(profile, lambda: print(f"Added {name} to {path}. Next: nnsight-hpc -c {name} {following}"))


@cluster.command("list")
@pass_app
def list_(app: App) -> None:
    """List the clusters; a star marks the one that is used when none is named."""
    profiles = config.load()
    chosen = profiles.chosen(app.cluster)
    rows = [
        [f"{name}{' *' if name == chosen else ''}", each.host, each.transport, each.command]
        for name, each in sorted(profiles.cluster.items())
    ]
    local = [f"{LOCAL}{' *' if chosen == LOCAL else ''}", "this machine", "", ""]
    app.answer(profiles, lambda: print_table(["name", "host", "transport", "command"], [local, *rows]))


@cluster.command("remove")
@click.argument("name")
@pass_app
def remove(app: App, name: str) -> None:
    """Forget the cluster NAME; nothing on it changes."""
    path = config.remove(name)
    app.answer({"removed": name}, lambda: print(f"Removed {name} from {path}."))


def _absolute(path: str | None) -> str | None:
    """A path that means the same file from every folder; one in the home folder keeps its ``~``."""
    return None if path is None else path if path.startswith("~") else str(Path(path).absolute())
