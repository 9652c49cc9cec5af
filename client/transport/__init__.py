"""Ways to run a program on a cluster's login node with its stdin and stdout at the end of a local socket.

Two siblings behind one contract: paramiko (the default; needs nothing installed) and the system's OpenSSH (FIDO keys,
GSSAPI, Include, whatever stands in ssh_config). Host keys are checked by both, always.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import socket

    from nnsight_hpc.client.config import Cluster
    from nnsight_hpc.wire.errors import HpcError

CONNECT_TIMEOUT = 15.0
"""Seconds until a login node must have answered, at each step of a login that no person types in."""


class Attached(Protocol):
    """A program that runs on the other side."""

    def why_ended(self) -> HpcError:
        """The error that explains why it ended before it said anything useful; waits a moment for its exit status."""


class Transport(Protocol):
    """One way to one cluster. A connection is made when it is first needed."""

    def attach(self, sock: socket.socket, command: str, *, ask: bool = True) -> Attached:
        """Run `command` with `sock` as its stdin and stdout; takes the socket over. May raise any `HpcError`.

        `ask`: a person at the terminal may be asked, where this needs a login of its own.
        """

    def hold(self) -> None:
        """Log in now, and keep the one connection for all later `attach` calls until `close`."""

    def alive(self) -> bool:
        """Whether the held connection still stands."""

    def close(self) -> None: ...


def transport_for(name: str, cluster: Cluster) -> Transport:
    """The transport that the profile names."""
    if cluster.transport == "openssh":
        from nnsight_hpc.client.transport.openssh import OpenSsh  # noqa: PLC0415 - only the one that is used

        return OpenSsh(name, cluster)
    from nnsight_hpc.client.transport.paramiko_ssh import Paramiko  # noqa: PLC0415 - 150 ms, for those who use it

    return Paramiko(name, cluster)
