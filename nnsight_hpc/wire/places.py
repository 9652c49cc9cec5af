"""Where a daemon and its workers keep things: one folder on the shared file system, one for sockets on the host.

::

    HOME/                       0700; `home(executor)`
      daemon.toml                 who may use the daemon, and quotas; where its owner has written one
      lease.json  secret  certificate.pem  key.pem     where the daemon is, and how workers prove themselves
      daemon.log  daemon-EPOCH.sqlite
      requests/ID.request  requests/ID.ATTEMPT.result  frames
      replicas/ID/              job.json, script, log, end.json; ranks.json: the node of each of several ranks
      datasets/NAME.zarr/       on scratch, where one is configured
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from nnsight_hpc.wire.errors import Denied, InvalidInput

HOME_VARIABLE = "NNSIGHT_HPC_HOME"
SCRATCH_VARIABLE = "NNSIGHT_HPC_SCRATCH"
SITE_VARIABLE = "NNSIGHT_HPC_SITE"
"""Where a site has decided on pools; see `daemon.site`."""


@dataclass(frozen=True)
class Places:
    """The folders and files of one daemon; nothing is made before it is needed."""

    home: Path
    datasets: Path

    @property
    def settings(self) -> Path:
        return self.home / "daemon.toml"

    @property
    def lease(self) -> Path:
        return self.home / "lease.json"

    @property
    def secret(self) -> Path:
        return self.home / "secret"

    @property
    def certificate(self) -> Path:
        return self.home / "certificate.pem"

    @property
    def key(self) -> Path:
        return self.home / "key.pem"

    @property
    def log(self) -> Path:
        return self.home / "daemon.log"

    @property
    def requests(self) -> Path:
        return self.home / "requests"

    @property
    def replicas(self) -> Path:
        return self.home / "replicas"

    def database(self, epoch: int) -> Path:
        return self.home / f"daemon-{epoch}.sqlite"

    def replica(self, replica: str) -> Path:
        return self.replicas / replica

    def model_copy(self, replica: str) -> Path:
        """Where a worker puts the small files of its model; see `wire.skeleton`."""
        return self.replica(replica) / "model"


def places(executor: str) -> Places:
    """The places of this user's daemon with that executor (``slurm`` or ``embedded``).

    ``$NNSIGHT_HPC_HOME`` and ``$NNSIGHT_HPC_SCRATCH`` move them; without these it is the user's state folder
    (``~/.local/state/nnsight-hpc``), which on a cluster must lie on a file system that all nodes share. Raises
    `InvalidInput` when one of them is relative.
    """
    base = _folder(HOME_VARIABLE)
    if base is None:
        import platformdirs  # noqa: PLC0415 - 30 ms that a worker with a given home does not need

        base = Path(platformdirs.user_state_dir("nnsight-hpc", appauthor=False))
    home = base / executor
    return Places(home, (_folder(SCRATCH_VARIABLE) or home) / "datasets")


def _folder(variable: str) -> Path | None:
    """The folder that a variable names, if it does; a relative one would be another for every program."""
    given = os.environ.get(variable)
    if not given:
        return None
    folder = Path(given).expanduser()
    if not folder.is_absolute():
        raise InvalidInput(f"${variable} is not an absolute path", where=given, next="let it begin with / or ~")
    return folder


def places_at(home: Path, datasets: Path | None = None) -> Places:
    return Places(home, datasets or home / "datasets")


def runtime_folder() -> Path:
    """A folder of this user on this host, for sockets: in ``$XDG_RUNTIME_DIR``, or one in ``/tmp`` with mode 0700.

    Raises `Denied` when somebody else owns it. Paths stay short: Linux refuses socket paths over 107 bytes.
    """
    base = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(base) / "nnsight-hpc" if base and Path(base).is_dir() else Path(f"/tmp/nnsight-hpc-{os.getuid()}")  # noqa: S108
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077 or not stat.S_ISDIR(status.st_mode):
        raise Denied(
            f"the folder for sockets, {folder}, is not yours alone",
            why=f"owner {status.st_uid}, mode {stat.S_IMODE(status.st_mode):o}",
            next="set XDG_RUNTIME_DIR to a folder that only you can enter",
        )
    return folder


def shared_folder(uid: int) -> Path:
    """Where the daemon of a user listens on this host when others may use it: they know the uid, and no folder of his."""
    return Path(f"/tmp/nnsight-hpc-{uid}-shared")  # noqa: S108 - who listens there is checked
