"""Proving who we are to a login node with paramiko: keys, then what a person types, only where one is at a terminal."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from paramiko import Agent, AuthenticationException, BadAuthenticationType, PKey, SSHException

from nnsight_hpc.client.transport.failures import refused_login
from nnsight_hpc.client.transport.terminal import answers, ask_secret, at_terminal

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from paramiko import Transport

    from nnsight_hpc.client.config import Cluster

DEFAULT_FILES = ("~/.ssh/id_ed25519", "~/.ssh/id_ecdsa", "~/.ssh/id_rsa")
TYPED = ("keyboard-interactive", "password")


class Login:
    """One attempt to log in; `tried` lists, in words, what was offered, for the message when all of it was refused."""

    def __init__(self, transport: Transport, cluster: Cluster, *, user: str, where: str) -> None:
        self._transport, self._cluster, self._user, self._where = transport, cluster, user, where
        self.tried: list[str] = []

    def run(self, files: Sequence[str]) -> None:
        """Offer the agent's keys and those in `files`, then ask the person; raises `Denied`."""
        said = ""
        try:
            further = self._offer_keys(files)
            if not further or self._ask(further):
                return
        except (SSHException, EOFError) as error:
            said = f"{type(error).__name__}: {error}"
        raise refused_login(self._cluster, self._where, tried=self.tried, said=said)

    def _offer_keys(self, files: Sequence[str]) -> Sequence[str]:
        """What the server wants besides: nothing when a key was enough; when none was, all that a person can type."""
        for name, key in self._keys(files):
            self.tried.append(f"{name} {key.get_name()} {key.fingerprint}")
            with suppress(AuthenticationException):
                return list(self._transport.auth_publickey(self._user, key))
        return TYPED

    def _keys(self, files: Sequence[str]) -> Iterator[tuple[str, PKey]]:
        for key in Agent().get_keys():
            yield f"agent: {key.comment or 'key'}", key
        for name in files:
            if (key := self._read(Path(name).expanduser())) is not None:
                yield name, key

    def _read(self, path: Path) -> PKey | None:
        if not path.is_file():
            if self._cluster.identity_file and path == Path(self._cluster.identity_file).expanduser():
                self.tried.append(f"{path}: no such file")
            return None
        try:
            return _load(path)
        except (OSError, SSHException, ValueError, TypeError, EOFError) as error:
            self.tried.append(f"{path}: could not be read ({str(error) or type(error).__name__})")
            return None

    def _ask(self, further: Sequence[str]) -> bool:
        """Whether what a person typed was accepted in the end; nobody is asked where there is no terminal."""
        if not at_terminal():
            return False
        for way in (way for way in TYPED if way in further):
            with suppress(BadAuthenticationType):  # the server does not take this one
                wanted = self._type(way)
                return not wanted or self._ask(wanted)
        return False

    def _type(self, way: str) -> list[str]:
        self.tried.append(f"{way}, typed")
        if way == "keyboard-interactive":
            return list(self._transport.auth_interactive(self._user, answers))
        return list(self._transport.auth_password(self._user, ask_secret(f"{self._cluster.host}'s password: ")))


def _load(path: Path) -> PKey:
    """The key in a file; its passphrase is asked for when it has one and there is a terminal."""
    try:
        return PKey.from_path(path)
    except (TypeError, ValueError, SSHException) as error:
        if "password" not in str(error).lower() and "passphrase" not in str(error).lower():
            raise
        if not at_terminal():
            raise SSHException("it has a passphrase, and there is no terminal to ask for it") from None
    return PKey.from_path(path, ask_secret(f"Passphrase for {path}: ").encode())
