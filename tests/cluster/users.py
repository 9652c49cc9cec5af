"""The users of the test cluster, known on its hosts only: accounts, homes, keys."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .layout import HOSTS, LAB_GID, LOGIN, LOGINS, USERS, Folders, make_folder, write_text

if TYPE_CHECKING:
    from collections.abc import Iterable

PROGRAMS = Path(sys.prefix) / "bin"
SEARCH_PATH = f"{PROGRAMS}:/usr/local/bin:/usr/bin:/bin"
STRANGER = "stranger"
_FIRST_ORDINARY_ID = 1000
_NOBODY = 65534


def write_accounts(folders: Folders) -> None:
    """Write passwd, group and shadow for the cluster's hosts, a passwd for the laptop, and the hosts file of both.

    The cluster's hosts know the machine's system accounts and ours. On the laptop root is the researcher, whose home,
    to programs that ask the account for it as ssh does, is the laptop's.
    """
    passwd, group = _lines("/etc/passwd"), _lines("/etc/group")
    names = [*(f"{name}:x:{uid}:{uid}::{folders.home(name)}:/bin/bash" for name, uid in USERS.items())]
    groups = [*(f"{name}:x:{uid}:" for name, uid in USERS.items()), f"lab:x:{LAB_GID}:{','.join(USERS)}"]
    _write_lines(folders.etc / "passwd", [*_system_accounts(passwd), *names])
    _write_lines(folders.etc / "group", [*_system_accounts(group), *groups])
    _write_lines(folders.etc / "shadow", [f"{line.split(':')[0]}:*:19000::::::" for line in names], mode=0o600)
    _write_lines(folders.etc / "passwd.laptop", [_with_home(line, folders.laptop_home) for line in passwd])
    _write_lines(
        folders.etc / "hosts", ["127.0.0.1 localhost", *(f"{h.inside} {h.name}" for h in HOSTS.values() if h.inside)]
    )
    _write_lines(
        folders.etc / "hosts.laptop", ["127.0.0.1 localhost laptop", *(f"{h.outside} {h.name} {LOGIN}" for h in LOGINS)]
    )


def create_homes(folders: Folders) -> None:
    """Make closed homes, with keys that may log in, and the virtual environment's programs on the user's PATH."""
    for name, uid in USERS.items():
        home = folders.home(name)
        make_folder(home, mode=0o700)
        make_folder(home / ".ssh", mode=0o700)
        write_text(home / ".ssh" / "authorized_keys", _public_key(folders.keys / name), mode=0o600)
        write_text(
            home / ".bashrc", f"export PATH={PROGRAMS}:$PATH\n"
        )  # Debian's bash reads it for `ssh host command`, too
        for path in (home, *home.rglob("*")):
            os.chown(path, uid, uid)


def create_keys(folders: Folders) -> None:
    """Make key pairs of all users, of somebody who has no account, and of each login node."""
    for name in (*USERS, STRANGER):
        _make_key(folders.keys / name)
    for host in LOGINS:
        _make_key(host_key(folders, host.name))


def create_laptop_home(folders: Folders) -> None:
    """Give the laptop the key of alice, and the host keys of the login nodes, by name, common name and address."""
    ssh = folders.laptop_home / ".ssh"
    make_folder(ssh, mode=0o700)
    make_folder(folders.laptop_home / "tmp", mode=0o700)
    write_text(ssh / "id_ed25519", (folders.keys / "alice").read_text(), mode=0o600)
    write_text(ssh / "id_ed25519.pub", _public_key(folders.keys / "alice"))
    known = (f"{h.name},{h.outside},{LOGIN} {_public_key(host_key(folders, h.name))}" for h in LOGINS)
    write_text(ssh / "known_hosts", "".join(known), mode=0o600)


def host_key(folders: Folders, host: str) -> Path:
    return folders.etc / f"ssh_host_key.{host}"


def environment(folders: Folders, host: str, user: str) -> dict[str, str]:
    """What a login shell of `user` would have set."""
    home = folders.laptop_home if host == "laptop" else Path("/root") if user == "root" else folders.home(user)
    values = {
        "HOME": str(home),
        "USER": user,
        "LOGNAME": user,
        "SHELL": "/bin/bash",
        "PATH": SEARCH_PATH,
        "LANG": "C.UTF-8",
    }
    if host == "laptop":
        values["TMPDIR"] = str(home / "tmp")
    return values


def _make_key(path: Path) -> None:
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", path.name, "-f", str(path)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)


def _public_key(path: Path) -> str:
    return path.with_name(f"{path.name}.pub").read_text()


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def _write_lines(path: Path, lines: Iterable[str], *, mode: int = 0o644) -> None:
    write_text(path, "".join(f"{line}\n" for line in lines), mode=mode)


def _system_accounts(lines: list[str]) -> list[str]:
    """Entries of a passwd or group file without the machine's people; the number is the third field of both."""
    numbers = ((int(line.split(":")[2]), line) for line in lines)
    return [line for number, line in numbers if number < _FIRST_ORDINARY_ID or number == _NOBODY]


def _with_home(line: str, home: Path) -> str:
    """The passwd entry `line`; if it is root's, with another home, its sixth field."""
    fields = line.split(":")
    return ":".join([*fields[:5], str(home), *fields[6:]]) if fields[0] == "root" else line
