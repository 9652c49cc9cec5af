"""Who may use a daemon beside its owner, and how they come to its socket."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nnsight_hpc.wire.errors import Denied
from nnsight_hpc.wire.places import shared_folder

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Share:
    """The users with these uids, and the members of the group `gid`.

    Where users are named one by one, the kernel lets everybody connect: a file has one group only. So the uid and the
    groups of each connection are looked at in any case.
    """

    uids: frozenset[int] = frozenset()
    gid: int | None = None

    def folder(self) -> Path:
        """The folder for the socket on this host, made where it is not there; raises `Denied` when it is somebody else's."""
        folder = shared_folder(os.getuid())
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if status.st_uid != os.getuid() or not stat.S_ISDIR(status.st_mode):
            raise Denied(
                f"the folder for the shared socket, {folder}, is not yours",
                why=f"its owner has uid {status.st_uid}",
                next="have it removed, by its owner or by those who look after the cluster",
            )
        folder.chmod(0o755)
        return folder

    def open_socket(self, path: Path) -> None:
        """Let them connect: that takes the right to write (unix(7))."""
        if self.uids or self.gid is None:
            path.chmod(0o666)
        else:
            os.chown(path, -1, self.gid)
            path.chmod(0o660)
