"""What the test cluster consists of: its hosts, their addresses, its users, and where its files lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

BASE = Path("/var/lib/nnsight-hpc-test")
"""Every cluster has a folder here: on a disk, below folders that only root can write, short enough for Unix sockets."""

SESSION_VARIABLE = "NNSIGHT_HPC_TEST_SESSION"
"""Set for every process that a test session starts, so that a leftover can be told from a stranger's process."""


@dataclass(frozen=True)
class HostSpec:
    """A host: its address in the cluster's own network, and in the one that joins the laptop to the login nodes."""

    name: str
    inside: str = ""
    outside: str = ""

    @property
    def addresses(self) -> list[str]:
        return [address for address in (self.inside, self.outside) if address]


LAPTOP = HostSpec("laptop", outside="10.78.0.1")
LOGINS = (HostSpec("login", "10.77.0.10", "10.78.0.10"), HostSpec("login2", "10.77.0.20", "10.78.0.20"))
LOGIN = "login.uni"
"""The name by which the laptop's hosts file, as a site's DNS, gives the addresses of all login nodes."""
COMPUTE = (HostSpec("n1", "10.77.0.11"), HostSpec("n2", "10.77.0.12"))
HOSTS = {spec.name: spec for spec in (LAPTOP, *LOGINS, *COMPUTE)}
SWITCH = HostSpec("switch")

USERS = {"alice": 2001, "bob": 2002}
LAB_GID = 2100
GPUS_PER_NODE = 2


@dataclass(frozen=True)
class Folders:
    """The files of one cluster. A path means the same on the machine and on every host."""

    root: Path

    @property
    def etc(self) -> Path:
        """Configurations, host keys, accounts."""
        return self.root / "etc"

    @property
    def log(self) -> Path:
        return self.root / "log"

    @property
    def spool(self) -> Path:
        """What slurmctld and the slurmds keep."""
        return self.root / "spool"

    @property
    def keys(self) -> Path:
        """Key pairs of the users, and one of a stranger."""
        return self.root / "keys"

    @property
    def laptop_home(self) -> Path:
        return self.root / "laptop"

    @property
    def shared(self) -> Path:
        """Readable by all users on all hosts; root writes."""
        return self.root / "shared"

    @property
    def scratch(self) -> Path:
        """Writable by all users on all hosts, as /tmp is."""
        return self.root / "scratch"

    def home(self, user: str) -> Path:
        return self.root / "home" / user

    def create(self) -> None:
        """Make the folders, with permissions that do not depend on the umask."""
        make_folder(self.root.parent)
        for folder in (self.root, self.etc, self.log, self.spool, self.shared, self.root / "home"):
            make_folder(folder)
        for folder in (self.keys, self.laptop_home):
            make_folder(folder, mode=0o700)
        make_folder(self.scratch, mode=0o1777)


def make_folder(path: Path, *, mode: int = 0o755) -> None:
    path.mkdir(exist_ok=True)
    path.chmod(mode)


def write_text(path: Path, text: str, *, mode: int = 0o644) -> None:
    path.touch(mode=0o600)
    path.chmod(mode)
    path.write_text(text)
