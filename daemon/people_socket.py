"""The Unix socket for people: made, made anew when its name has gone, and removed."""

from __future__ import annotations

import hashlib
import logging
import os
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

from aiohttp import web

from nnsight_hpc.wire.errors import InvalidInput
from nnsight_hpc.wire.places import runtime_folder

if TYPE_CHECKING:
    from pathlib import Path

    from nnsight_hpc.daemon.admission import Share
    from nnsight_hpc.daemon.config import Config

logger = logging.getLogger(__name__)

_LONGEST_SOCKET_PATH = 107  # unix(7): sun_path has 108 bytes, with the final zero


def socket_path(config: Config, share: Share | None) -> Path:
    """The socket on this host; raises `InvalidInput` where its path would be too long for Linux."""
    digest = hashlib.sha256(str(config.places.home).encode()).hexdigest()[:8]
    path = (share.folder() if share else runtime_folder()) / f"{config.executor}-{digest}.sock"
    if len(os.fsencode(path)) > _LONGEST_SOCKET_PATH:
        raise InvalidInput(
            f"the path of the socket is longer than the {_LONGEST_SOCKET_PATH} bytes that Linux allows",
            where=str(path),
            next="set XDG_RUNTIME_DIR to a shorter path",
        )
    return path


class PeoplesSocket:
    """Listens for people.

    Its name may go while the daemon runs: systemd removes ``$XDG_RUNTIME_DIR`` when its user logs out for the last time
    (pam_systemd(8)). `renew` then listens at the place that is right by now.
    """

    def __init__(self, runner: web.AppRunner, config: Config, share: Share | None) -> None:
        self._runner, self._config, self._share = runner, config, share
        self._inode = 0
        self.path = socket_path(config, share)

    async def listen(self) -> None:
        self.path.unlink(missing_ok=True)  # of a daemon that was killed: the lease is ours
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(self.path))
        self.path.chmod(0o600)
        if self._share:
            self._share.open_socket(self.path)
        self._inode = self.path.stat().st_ino
        await web.SockSite(self._runner, listener).start()

    async def renew(self) -> bool:
        """Listen again where the name has gone; whether it had."""
        if self.path.exists():
            return False
        logger.warning("%s has gone", self.path)
        for site in list(self._runner.sites):
            await site.stop()  # connections that are open stay
        self.path = socket_path(self._config, self._share)
        await self.listen()
        return True

    def remove(self) -> None:
        """Unless the next daemon has put its own in this place."""
        with suppress(FileNotFoundError):
            if self.path.stat().st_ino == self._inode:
                self.path.unlink()
