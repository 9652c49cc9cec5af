"""The known_hosts files (sshd(8), "SSH_KNOWN_HOSTS FILE FORMAT"), read line by line.

paramiko's own reader gives up on ``@cert-authority`` and ``@revoked`` lines, knows no patterns and only one key of a
type for each host. Certificates are not supported: a host that has only a ``@cert-authority`` line counts as unknown.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from hmac import compare_digest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paramiko import HostKeys, PKey, SSHException
from paramiko.hostkeys import HostKeyEntry, InvalidHostKey

if TYPE_CHECKING:
    from collections.abc import Iterable

SYSTEM_FILES = ("~/.ssh/known_hosts", "~/.ssh/known_hosts2", "/etc/ssh/ssh_known_hosts", "/etc/ssh/ssh_known_hosts2")


@dataclass
class KnownHosts:
    """Keys by host pattern, and keys that nobody may be trusted with (for whatever host they were revoked)."""

    keys: list[tuple[list[str], PKey]] = field(default_factory=list)
    revoked: set[bytes] = field(default_factory=set)

    def of(self, host: str, port: int) -> list[PKey]:
        """The keys that are trusted for a host, in the files' order."""
        names = [host.lower()] if port == 22 else [f"[{host.lower()}]:{port}"]
        return [
            key
            for patterns, key in self.keys
            if any(_matches(name, patterns) for name in names) and key.asbytes() not in self.revoked
        ]

    def is_revoked(self, key: PKey) -> bool:
        return key.asbytes() in self.revoked


def read_known_hosts(extra: str | None = None) -> KnownHosts:
    """What the profile's file and the system's files say; files that are not there, and lines that no one reads, count not."""
    known = KnownHosts()
    for name in (*([extra] if extra else []), *SYSTEM_FILES):
        try:
            text = Path(name).expanduser().read_text(encoding="utf-8", errors="replace")
        except (OSError, RuntimeError):  # RuntimeError: no home folder
            continue
        _add_lines(known, text.splitlines())
    return known


def _add_lines(known: KnownHosts, lines: Iterable[str]) -> None:
    for line in lines:
        marker, _, rest = line.strip().partition(" ") if line.lstrip().startswith("@") else ("", "", line.strip())
        entry = _entry(rest)
        if entry is None or marker not in ("", "@revoked"):
            continue
        if marker:
            known.revoked.add(entry.key.asbytes())
        else:
            known.keys.append((entry.hostnames, entry.key))


def _entry(line: str) -> Any | None:
    """One plain line as paramiko reads it, or None: comments, key types that it does not know, damaged lines."""
    if not line or line.startswith("#"):
        return None
    try:
        entry = HostKeyEntry.from_line(line)
    except (InvalidHostKey, SSHException, ValueError, IndexError):
        return None
    return entry if entry is not None and entry.key is not None else None


def _matches(name: str, patterns: list[str]) -> bool:
    """Whether one of the patterns matches and none that begins with ``!`` does; hashed names match by their hash."""
    if any(p.startswith("!") and _one_matches(name, p[1:]) for p in patterns):
        return False
    return any(_one_matches(name, p) for p in patterns if not p.startswith("!"))


def _one_matches(name: str, pattern: str) -> bool:
    if pattern.startswith("|1|"):
        return compare_digest(HostKeys.hash_host(name, pattern), pattern)
    literal = pattern.lower().replace("[", "[[]")  # only * and ? are special in known_hosts
    return fnmatchcase(name, literal)
