"""The daemons of a host: how each is started, and how one sees that it is ready."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import slurm, sshd
from .layout import COMPUTE, LAPTOP, LOGINS

if TYPE_CHECKING:
    from .hosts import Host
    from .layout import Folders, HostSpec

_SSH_PORT = 22


@dataclass(frozen=True)
class Service:
    """A daemon: its command, in the foreground, and the TCP port or the Unix socket that it answers on."""

    name: str
    command: list[str]
    port: int = 0
    socket: str = ""

    def ready(self, host: Host) -> bool:
        return host.listens_on(self.socket) if self.socket else host.listens(self.port)


def services_of(folders: Folders, spec: HostSpec) -> dict[str, Service]:
    """The daemons of a host, in the order in which they start."""
    services = []
    if spec is not LAPTOP:
        services.append(Service("munged", slurm.munge_command(folders, spec.name), socket=slurm.MUNGE_SOCKET))
    if spec in LOGINS:
        services.append(Service("sshd", sshd.command(folders, spec.name), port=_SSH_PORT))
    if spec is slurm.CONTROLLER:
        services.append(Service("slurmctld", slurm.controller_command(), port=slurm.CONTROLLER_PORT))
    if spec in COMPUTE:
        services.append(Service("slurmd", slurm.node_command(spec.name), port=slurm.NODE_PORT))
    return {service.name: service for service in services}
