"""Reading known_hosts, with ssh-keygen as the judge."""

from __future__ import annotations

import subprocess

import pytest
from paramiko import PKey

from nnsight_hpc.client.transport.known_hosts import read_known_hosts
from tests.client.sshd import keygen


@pytest.fixture
def keys(base):
    """Two public keys as known_hosts has them."""
    for name in ("a", "b"):
        keygen(base / name)
    return {name: " ".join((base / f"{name}.pub").read_text().split()[:2]) for name in ("a", "b")}


def ssh_keygen_finds(path, host: str) -> bool:
    command = ["ssh-keygen", "-F", host, "-f", str(path)]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


@pytest.mark.parametrize(
    "patterns",
    [
        "login.uni.edu",
        "LOGIN.uni.edu",
        "*.uni.edu",
        "login?.uni.edu,login.uni.edu",
        "*.uni.edu,!login.uni.edu",
        "[login.uni.edu]:2222",
        "[*.uni.edu]:2222",
        "login.uni.ed",
        "other,10.0.0.1",
        "*",
    ],
)
@pytest.mark.parametrize(("host", "port"), [("login.uni.edu", 22), ("login.uni.edu", 2222), ("10.0.0.1", 22)])
def test_names_and_patterns_match_as_for_ssh(base, keys, patterns, host, port):
    """The same hosts are known to us as to OpenSSH."""
    path = base / "known"
    path.write_text(f"{patterns} {keys['a']}\n")
    name = host if port == 22 else f"[{host}]:{port}"
    assert bool(read_known_hosts(str(path)).of(host, port)) == ssh_keygen_finds(path, name)


def test_hashed_names_are_found(base, keys):
    """What `ssh-keygen -H` hid is known, and no other name is."""
    path = base / "known"
    path.write_text(f"login {keys['a']}\n[gate]:2222 {keys['b']}\n")
    subprocess.run(["ssh-keygen", "-H", "-f", str(path)], check=True, capture_output=True)
    known = read_known_hosts(str(path))
    assert [len(known.of(*each)) for each in [("login", 22), ("gate", 2222), ("login", 2222), ("gate", 22)]] == [
        1,
        1,
        0,
        0,
    ]


def test_all_keys_of_a_host_count_and_revoked_ones_never(base, keys):
    """A host may change between two known keys; a revoked one is trusted nowhere, in whatever order the lines stand."""
    path = base / "known"
    path.write_text(f"login {keys['a']}\nlogin {keys['b']}\n")
    assert len(read_known_hosts(str(path)).of("login", 22)) == 2
    path.write_text(f"login {keys['a']}\nlogin {keys['b']}\n@revoked * {keys['a']}\n")
    known = read_known_hosts(str(path))
    assert [key.get_base64() for key in known.of("login", 22)] == [keys["b"].split()[1]]
    assert known.is_revoked(PKey.from_path(base / "a"))


def test_the_users_own_file_counts_too(base, keys):
    """A profile's file is read besides ~/.ssh/known_hosts."""
    (base / "home" / ".ssh").mkdir()
    (base / "home" / ".ssh" / "known_hosts").write_text(f"login {keys['a']}\n")
    (base / "known").write_text(f"gate {keys['b']}\n")
    known = read_known_hosts(str(base / "known"))
    assert [len(known.of(host, 22)) for host in ("login", "gate", "other")] == [1, 1, 0]
