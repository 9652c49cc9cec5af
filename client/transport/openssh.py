"""SSH by the system's ``ssh``, for what only it can do: second factors, FIDO keys, GSSAPI, ControlMaster, Include.

The local socket itself becomes the program's stdin and stdout, so no byte passes through Python. ``-v`` is always given and its
lines are kept aside: they say which host key was offered and which keys were tried, without a second login.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections import deque
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import msgspec

from nnsight_hpc.client.transport import CONNECT_TIMEOUT
from nnsight_hpc.client.transport.failures import (
    changed_host_key,
    program_ended,
    refused_login,
    revoked_host_key,
    unknown_host_key,
    unreachable,
)
from nnsight_hpc.client.transport.terminal import at_terminal
from nnsight_hpc.wire.errors import HpcError, NotFound
from nnsight_hpc.wire.places import runtime_folder

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

    from nnsight_hpc.client.config import Cluster

_SSH_FAILED = 255
_TYPING_TIMEOUT = 300


class OpenSsh:
    """A `Transport`. `hold` starts a ControlMaster of our own; without it each `attach` is one ssh, one login."""

    def __init__(self, name: str, cluster: Cluster) -> None:
        self._cluster, self._where = cluster, f"cluster {name}, {cluster.host}"
        digest = hashlib.sha256(name.encode() + msgspec.json.encode(cluster)).hexdigest()
        self._held = False
        self._control = runtime_folder() / f"ssh-{digest[:8]}"

    def hold(self) -> None:
        """Log in with ``ssh -M -f``, which goes to the background once it has."""
        self._held = True
        if self.alive():
            return
        self._control.unlink(missing_ok=True)
        command = [
            *self._ssh("-S", str(self._control), "-M", "-N", "-f", "-o", "ControlPersist=no"),
            self._cluster.host,
        ]
        log = self._control.with_suffix(".log")
        try:
            with log.open("wb") as stderr:  # a file: a pipe would stay open in the master, and we would wait for it
                status = _run(command, stderr=stderr.fileno(), timeout=_login_timeout())
            if status != 0:
                raise self.ended(_Said.of(log.read_bytes()), status, "ssh -M")
        finally:
            log.unlink(missing_ok=True)

    def alive(self) -> bool:
        if not self._control.exists():
            return False
        command = [*self._ssh("-S", str(self._control), "-O", "check"), self._cluster.host]
        return _run(command, stderr=subprocess.DEVNULL, timeout=CONNECT_TIMEOUT) == 0

    def attach(self, sock: socket.socket, command: str, *, ask: bool = True) -> OpenSshAttached:
        # Over the master or not at all: ssh alone would log in once more where the master has gone.
        over = ["-S", str(self._control), "-o", "ProxyCommand=false"] if self._held else []
        ssh = self._ssh(*over, "-o", "ControlMaster=no", ask=ask)
        with sock:
            process = _start([*ssh, self._cluster.host, command], sock)
        return OpenSshAttached(self, process, command)

    def close(self) -> None:
        """End the master that `hold` started; a connection without one ends with its stream."""
        if self._control.exists():
            _run(
                [*self._ssh("-S", str(self._control), "-O", "exit"), self._cluster.host],
                stderr=subprocess.DEVNULL,
                timeout=CONNECT_TIMEOUT,
            )

    def ended(self, said: _Said, status: int | None, command: str) -> HpcError:
        """What ssh's own words mean; where ssh itself did not fail, the program on the other side did."""
        text = "\n".join(said.lines)
        if status != _SSH_FAILED:
            return program_ended(self._cluster, self._where, status=status, said=text, command=command)
        if "REVOKED HOST KEY" in text or "is marked as revoked" in text:
            return revoked_host_key(self._where, host=said.host, offered=said.host_key)
        if "HOST IDENTIFICATION HAS CHANGED" in text:
            return changed_host_key(self._where, host=said.host, port=said.port, offered=said.host_key)
        if "Host key verification failed" in text:
            return unknown_host_key(self._cluster, self._where, host=said.host, port=said.port, offered=said.host_key)
        if "Permission denied" in text or "Too many authentication failures" in text:
            return refused_login(self._cluster, self._where, tried=said.tried, said=text)
        return unreachable(self._cluster, self._where, text)

    def _ssh(self, *arguments: str, ask: bool = True) -> list[str]:
        """The command, with what must hold whatever stands in the user's configuration."""
        options = {
            "StrictHostKeyChecking": "yes",
            "UpdateHostKeys": "no",
            "ConnectTimeout": str(int(CONNECT_TIMEOUT)),
            "ServerAliveInterval": "15",
            "ServerAliveCountMax": "4",
            "BatchMode": "no" if ask and at_terminal() else "yes",
            "ClearAllForwardings": "yes",
            "ForwardAgent": "no",
            "ForwardX11": "no",
            "PermitLocalCommand": "no",
            "RemoteCommand": "none",
            "RequestTTY": "no",
        }
        if self._cluster.known_hosts:
            own = Path(self._cluster.known_hosts).expanduser().absolute()
            quoted = str(own).replace("%", "%%")
            options["UserKnownHostsFile"] = f'"{quoted}" ~/.ssh/known_hosts ~/.ssh/known_hosts2'
        given = [f"-o{key}={value}" for key, value in options.items()]
        port = ["-p", str(self._cluster.port)] if self._cluster.port else []
        identity = ["-i", self._cluster.identity_file] if self._cluster.identity_file else []
        return ["ssh", "-v", *given, *port, *identity, *arguments]


class OpenSshAttached:
    """A running ssh. A thread reads its stderr to the end and reaps it, so that no zombie stays."""

    def __init__(self, owner: OpenSsh, process: subprocess.Popen[bytes], command: str) -> None:
        self._owner, self._process, self._command = owner, process, command
        self._said = _Said()
        self._reader = Thread(target=self._read, daemon=True, name="ssh-stderr")
        self._reader.start()

    def why_ended(self) -> HpcError:
        self._reader.join(5)
        return self._owner.ended(self._said, self._process.poll(), self._command)

    def _read(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as stderr:
            for line in stderr:
                self._said.add(line.decode("utf-8", "replace").rstrip())
        self._process.wait()


class _Said:
    """ssh's stderr: the lines for people, and what ``-v`` tells."""

    def __init__(self) -> None:
        self.lines: deque[str] = deque(maxlen=40)
        self.tried: list[str] = []
        self.host, self.port, self.host_key = "", 22, ""

    @classmethod
    def of(cls, data: bytes) -> _Said:
        said = cls()
        for line in data.decode("utf-8", "replace").splitlines():
            said.add(line)
        return said

    def add(self, line: str) -> None:
        if not line.startswith("debug1: "):
            if not _CHATTER.match(line):
                self.lines.append(line)
        elif found := _OFFERED_HOST_KEY.match(line):
            self.host_key = found[1]
        elif found := _OFFERED_KEY.match(line):
            self.tried.append(found[1])
        elif found := _PEER.match(line):
            self.host, self.port = found[1], int(found[2])


_CHATTER = re.compile(r"OpenSSH_|Authenticated to |Transferred: |Bytes per second: |Pseudo-terminal will not")
_OFFERED_HOST_KEY = re.compile(r"debug1: Server host key: (.+)")
_OFFERED_KEY = re.compile(r"debug1: Offering public key: (.+)")
_PEER = re.compile(r"debug1: Authenticating to (\S+):(\d+) as ")


def _login_timeout() -> float:
    return _TYPING_TIMEOUT if at_terminal() else 2 * CONNECT_TIMEOUT


def _run(command: Sequence[str], *, stderr: int, timeout: float) -> int:
    try:
        return subprocess.run(
            command, check=False, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr, timeout=timeout
        ).returncode
    except FileNotFoundError:
        raise _no_ssh() from None
    except subprocess.TimeoutExpired:
        return _SSH_FAILED


def _start(command: Sequence[str], sock: socket.socket) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(command, stdin=sock.fileno(), stdout=sock.fileno(), stderr=subprocess.PIPE)
    except FileNotFoundError:
        raise _no_ssh() from None


def _no_ssh() -> NotFound:
    return NotFound(
        "the program ssh is not on this machine",
        next='install the package openssh-client, or set transport = "paramiko" for this cluster',
    )
