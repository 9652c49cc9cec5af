"""What a person is told when a login does not work: the same words from both transports."""

from __future__ import annotations

import shlex
from importlib.metadata import version
from typing import TYPE_CHECKING

from nnsight_hpc.client.config import config_file
from nnsight_hpc.wire.errors import Denied, HpcError, NotFound, Unreachable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nnsight_hpc.client.config import Cluster

_ABSENT = ("command not found", "not found", "No such file or directory", "No module named")
_SHOWN = 12


def ssh_command(cluster: Cluster) -> str:
    """The ssh command that a person would type to log in there."""
    return shlex.join(["ssh", *(["-p", str(cluster.port)] if cluster.port else []), cluster.host])


def unknown_host_key(cluster: Cluster, where: str, *, host: str, port: int, offered: str) -> Denied:
    """The host is in no known_hosts file; `offered` is the key's type and SHA-256 fingerprint."""
    scan = ["ssh-keyscan", *(["-p", str(port)] if port != 22 else []), host]
    file = cluster.known_hosts or "~/.ssh/known_hosts"
    return Denied(
        f"the host key of {host} is not known, so nothing was sent to it",
        where=where,
        why=f"it offered {offered}" if offered else "it is in none of your known_hosts files",
        next=f"compare that fingerprint with the one that the site publishes, then add the key:\n"
        f"{shlex.join(scan)} >> {file}\n"
        f"or log in once with `{ssh_command(cluster)}` and answer its question",
    )


def changed_host_key(where: str, *, host: str, port: int, offered: str, known: str = "") -> Denied:
    """Another key is known for the host: either it was set up anew, or somebody stands between."""
    name = host if port == 22 else f"[{host}]:{port}"
    return Denied(
        f"THE HOST KEY OF {host} HAS CHANGED: somebody may be listening in, so nothing was sent to it",
        where=where,
        why="; ".join([f"it offered {offered}", *([f"known is {known}"] if known else [])]),
        next="ask the site whether it changed its key. Only if it did: "
        f"{shlex.join(['ssh-keygen', '-R', name])}, and add the new one",
    )


def revoked_host_key(where: str, *, host: str, offered: str) -> Denied:
    return Denied(
        f"the host key of {host} is marked @revoked in a known_hosts file, so nothing was sent to it",
        where=where,
        why=f"it offered {offered}",
        next="ask the site for its new host key",
    )


def refused_login(cluster: Cluster, where: str, *, tried: Sequence[str], said: str = "") -> Denied:
    keys = "\n".join(tried) or "no key: there is none in the agent and none in ~/.ssh"
    return Denied(
        f"{cluster.host} refused the login",
        where=where,
        why=f"keys tried:\n{keys}" + (f"\n{said}" if said else ""),
        next=f"check that `{ssh_command(cluster)}` works; name another key with identity_file in {config_file()}; "
        "run in a terminal where a passphrase or a second factor has to be typed",
    )


def unreachable(cluster: Cluster, where: str, why: str) -> Unreachable:
    return Unreachable(
        f"{cluster.host} cannot be reached", where=where, why=why, next=f"check that `{ssh_command(cluster)}` works"
    )


def program_ended(cluster: Cluster, where: str, *, status: int | None, said: str, command: str) -> HpcError:
    """The program on the cluster ended before it said hello: it is missing, or it failed."""
    said = "\n".join(said.strip().splitlines()[-_SHOWN:])
    if status in (126, 127) or any(sign in said for sign in _ABSENT):
        return missing_program(cluster, where, said)
    return Unreachable(
        f"`{command}` on {cluster.host} ended before it said hello",
        where=where,
        why="\n".join(filter(None, [f"exit status {'unknown' if status is None else status}", said])),
        next=f"look at it with: {ssh_command(cluster)} {shlex.quote(command)}",
    )


def missing_program(cluster: Cluster, where: str, said: str) -> NotFound:
    install = f'python3 -m pip install --user "nnsight-hpc[worker]=={version("nnsight-hpc")}"'
    return NotFound(
        f"nnsight-hpc is not installed on {cluster.host}, or not where its shell looks",
        where=where,
        why=said or f"`{cluster.command}` was not found",
        next=f"install it there:\n{ssh_command(cluster)} {shlex.quote(install)}\n"
        f'or, where it lies elsewhere, set command = "/path/to/nnsight-hpc" for this cluster in {config_file()}',
    )
