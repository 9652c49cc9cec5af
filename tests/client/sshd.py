"""A real sshd on a port of its own, as the user who runs the tests, for the transports' tests."""

from __future__ import annotations

import getpass
import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

from nnsight_hpc.client.config import Cluster

_CONFIG = """\
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/hostkey
PidFile none
AuthorizedKeysFile {folder}/authorized_keys
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin yes
MaxStartups 100
LogLevel VERBOSE
"""

PROGRAM = Path(sys.executable).with_name("nnsight-hpc")


class Sshd:
    """A login node on this machine; its user is the one who runs the tests."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.user, self.host = folder, getpass.getuser(), "127.0.0.1"
        for name in ("hostkey", "otherhostkey", "key", "otherkey"):
            keygen(folder / name)
        (folder / "authorized_keys").write_bytes((folder / "key.pub").read_bytes())
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)

    def __enter__(self) -> Self:
        while not self._listens():  # somebody else may take the port before sshd does
            pass
        self.known_hosts = self.write_known_hosts("known_hosts", "hostkey")
        return self

    def _listens(self) -> bool:
        """Start it on a port that is free just now; whether it was free still."""
        self.port = _free_port()
        (self.folder / "sshd_config").write_text(_CONFIG.format(port=self.port, folder=self.folder))
        command = ["/usr/sbin/sshd", "-D", "-e", "-f", str(self.folder / "sshd_config")]
        with (self.folder / "log").open("wb") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=log)
        until = time.monotonic() + 120
        while "Server listening" not in (said := (self.folder / "log").read_text()):
            if self._process.poll() is not None and "Address already in use" in said:
                return False
            if self._process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(said)
            time.sleep(0.02)
        return True

    @property
    def pid(self) -> int:
        """The process that listens."""
        return self._process.pid

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(120)

    def write_known_hosts(self, name: str, key: str, *, prefix: str = "") -> Path:
        """A known_hosts file that has `key` as this host's."""
        path = self.folder / name
        kind, data, *_ = (self.folder / f"{key}.pub").read_text().split()
        path.write_text(f"# a comment\n{prefix}[{self.host}]:{self.port} {kind} {data}\n")
        return path

    def fingerprint(self, key: str) -> str:
        """A key's SHA-256 fingerprint as ssh-keygen tells it."""
        command = ["ssh-keygen", "-lf", str(self.folder / f"{key}.pub")]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[1]

    def profile(self, transport: str, *, environment: dict[str, str] | None = None, **changes: object) -> Cluster:
        """A profile that reaches this host; `environment` is that of the program there."""
        settings = [f"{key}={value}" for key, value in (environment or {}).items()]
        given: dict[str, object] = {
            "host": f"{self.user}@{self.host}",
            "port": self.port,
            "transport": transport,
            "identity_file": str(self.folder / "key"),
            "known_hosts": str(self.known_hosts),
            "command": shlex.join(["env", *settings, str(PROGRAM)]),
            **changes,
        }
        return Cluster(**{key: value for key, value in given.items() if value is not None})  # type: ignore[arg-type]


def keygen(path: Path, *, passphrase: str = "") -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-f", str(path)], check=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
