"""The SSH server of a login node."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .layout import USERS, Folders, write_text
from .users import host_key

if TYPE_CHECKING:
    from pathlib import Path

_CONFIG = """\
Port 22
HostKey {host_key}
PidFile none
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
AllowUsers {users}
AcceptEnv LANG LC_*
PrintMotd no
MaxStartups 100
LogLevel VERBOSE
Subsystem sftp internal-sftp
"""


def write_config(folders: Folders, host: str) -> Path:
    path = folders.etc / f"sshd_config.{host}"
    write_text(path, _CONFIG.format(host_key=host_key(folders, host), users=" ".join(USERS)))
    return path


def command(folders: Folders, host: str) -> list[str]:
    return ["/usr/sbin/sshd", "-D", "-e", "-f", str(write_config(folders, host))]
