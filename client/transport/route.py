"""Where a profile's host really is: ``~/.ssh/config`` gives HostName, User, Port, IdentityFile and ProxyJump."""

from __future__ import annotations

import getpass
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paramiko import ConfigParseError, SSHConfig

from nnsight_hpc.client.transport.keys import DEFAULT_FILES
from nnsight_hpc.wire.errors import InvalidInput

if TYPE_CHECKING:
    from nnsight_hpc.client.config import Cluster


@dataclass(frozen=True)
class Hop:
    """One host to log in to, on the way or at its end."""

    host: str
    port: int
    user: str
    files: tuple[str, ...]


def route(cluster: Cluster) -> list[Hop]:
    """The hosts to log in to, one through the other; the last is the cluster's. Raises `InvalidInput`."""
    config = _ssh_config()
    user, name = _split(cluster.host)
    options = config.lookup(name)
    if "proxycommand" in options:
        raise InvalidInput(
            f"ssh's configuration has a ProxyCommand for {name}, which paramiko's transport does not use",
            next='use ProxyJump, or set transport = "openssh" for this cluster',
        )
    jumps = [jump.strip() for jump in options.get("proxyjump", "none").split(",")]
    hops = [_jump(config, jump) for jump in jumps if jump.lower() != "none"]
    own = (cluster.identity_file,) if cluster.identity_file else ()
    last = _hop(options, user, cluster.port, own)
    return [*hops, last]


def _ssh_config() -> SSHConfig:
    path = Path("~/.ssh/config").expanduser()
    try:
        return SSHConfig.from_path(str(path)) if path.is_file() else SSHConfig()
    except (ConfigParseError, OSError) as error:
        raise InvalidInput("ssh's configuration cannot be read", where=str(path), why=str(error)) from None


def _jump(config: SSHConfig, text: str) -> Hop:
    user, address = _split(text.removeprefix("ssh://"))
    name, separator, port = address.rpartition(":")
    if not separator or address.endswith("]"):
        name, port = address, ""
    if port and not port.isdigit():
        raise InvalidInput(f"{text!r} is not a host that ProxyJump can name", where="~/.ssh/config")
    return _hop(config.lookup(name.strip("[]")), user, int(port) if port else None, ())


def _hop(options: Any, user: str | None, port: int | None, own: tuple[str, ...]) -> Hop:
    """What is given wins over ssh's configuration, and that over the defaults."""
    files = (*own, *options.get("identityfile", () if own else DEFAULT_FILES))  # as ssh does
    return Hop(
        host=options["hostname"],
        port=port or int(options.get("port", 22)),
        user=user or options.get("user") or getpass.getuser(),
        files=tuple(dict.fromkeys(files)),
    )


def _split(host: str) -> tuple[str | None, str]:
    user, at, name = host.rpartition("@")
    return (user if at else None), name
