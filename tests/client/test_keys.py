"""Second factors with paramiko, against a server that asks for them."""

from __future__ import annotations

import socket
import threading

import paramiko
import pytest

from nnsight_hpc.client.config import Cluster
from nnsight_hpc.client.transport import keys, terminal
from nnsight_hpc.client.transport.keys import Login
from nnsight_hpc.wire.errors import Denied
from tests.client.sshd import keygen


class TwoFactors(paramiko.ServerInterface):
    """Wants a key, then a code that is asked for."""

    def __init__(self, key: str) -> None:
        self.key = key

    def get_allowed_auths(self, username):
        return "publickey,keyboard-interactive"

    def check_auth_publickey(self, username, key):
        right = key.get_base64() == self.key
        return paramiko.AUTH_PARTIALLY_SUCCESSFUL if right else paramiko.AUTH_FAILED

    def check_auth_interactive(self, username, submethods):
        return paramiko.InteractiveQuery("", "", ("Code: ", False))

    def check_auth_interactive_response(self, responses):
        return paramiko.AUTH_SUCCESSFUL if responses == ["123456"] else paramiko.AUTH_FAILED


@pytest.fixture
def login(base):
    """A login to such a server; `login.files` has the right key."""
    keygen(base / "key")
    ours, theirs = socket.socketpair()
    server = paramiko.Transport(theirs)
    server.add_server_key(paramiko.RSAKey.generate(2048))
    server.start_server(server=TwoFactors((base / "key.pub").read_text().split()[1]), event=threading.Event())
    client = paramiko.Transport(ours)
    client.start_client(timeout=120)
    login = Login(client, Cluster(host="login"), user="alice", where="here")
    login.files, login.transport = [str(base / "key")], client
    yield login
    client.close()
    server.close()


@pytest.fixture
def person(monkeypatch):
    """Somebody at the terminal, who types what the list says."""
    typed: list[str] = []
    monkeypatch.setattr(keys, "at_terminal", lambda: True)
    for module in (keys, terminal):
        monkeypatch.setattr(module, "ask_secret", lambda _prompt: typed.pop(0))
    return typed


def test_a_second_factor_is_asked_for_after_the_key(login, person):
    """Key and code together log in."""
    person.append("123456")
    login.run(login.files)
    assert login.transport.is_authenticated()
    assert login.tried[-1] == "keyboard-interactive, typed"


def test_a_wrong_code_is_refused(login, person):
    """The message says what was tried."""
    person += ["000000"] * 3
    with pytest.raises(Denied) as caught:
        login.run(login.files)
    assert "keyboard-interactive, typed" in caught.value.why


def test_without_a_terminal_nobody_is_asked(login):
    """The key alone is not enough, and nothing hangs."""
    with pytest.raises(Denied):
        login.run(login.files)
    assert [line for line in login.tried if "typed" in line] == []
