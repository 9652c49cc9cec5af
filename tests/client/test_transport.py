"""Both transports against a real sshd: one contract."""

from __future__ import annotations

import socket
import threading

import paramiko
import pytest

from nnsight_hpc.client import config
from nnsight_hpc.client.launch import wait_until_gone
from nnsight_hpc.client.session import Remote, connect, open_stream
from nnsight_hpc.client.transport import transport_for
from nnsight_hpc.wire.errors import Denied, HpcError, Incompatible, InvalidInput, NotFound, Unreachable
from nnsight_hpc.wire.http import HttpClient
from nnsight_hpc.wire.messages import Hello
from tests.client.sshd import keygen

KINDS = ["paramiko", "openssh"]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def client_of(profile) -> HttpClient:
    return HttpClient(Remote("uni", profile).open, peer="uni")


def refused(profile) -> HpcError:
    """The error of a first call."""
    with pytest.raises(HpcError) as caught:
        client_of(profile).get("/v1/hello", Hello)
    return caught.value


def test_a_call_reaches_the_daemon_through_ssh_and_bridge(kind, sshd, environment, slurm_server):
    """HTTP works over the bridge, several calls on one connection."""
    client = client_of(sshd.profile(kind, environment=environment))
    try:
        assert slurm_server.hello() == client.get("/v1/hello", Hello)
        assert client.call("GET", "/v1/log").decode() == "the daemon's log\n"
    finally:
        client.close()


def test_connect_uses_the_profile_of_that_name(kind, sshd, environment, slurm_server):
    """`connect` finds the profile in the configuration file and goes there."""
    config.add("uni", sshd.profile(kind, environment=environment), default=True)
    client = connect()
    assert client.get("/v1/hello", Hello).executor == "slurm"
    client.close()


def test_a_stream_is_binary_clean_and_ends(kind, sshd):
    """Every byte value crosses both ways unchanged; the end of the program is the end of the stream."""
    ours, theirs = socket.socketpair()
    sent = bytes(range(256)) * 4096
    transport = transport_for("uni", sshd.profile(kind))
    transport.attach(theirs, "cat")
    threading.Thread(target=lambda: (ours.sendall(sent), ours.shutdown(socket.SHUT_WR)), daemon=True).start()
    received = b"".join(iter(lambda: ours.recv(1 << 16), b""))
    ours.close()
    transport.close()
    assert sent == received


def test_what_a_login_prints_before_the_hello_is_passed_over(kind, sshd, environment, slurm_server):
    """A banner with and without a newline, and JSON that is no hello, stand in nobody's way."""
    profile = sshd.profile(kind, environment=environment)
    noisy = f"echo 'Welcome to {{the}} cluster'; echo '{{\"a\": 1}}'; printf '3 messages '; {profile.command}"
    client = client_of(sshd.profile(kind, command=noisy))
    assert client.get("/v1/hello", Hello).owner == "alice"
    client.close()


def test_noise_without_end_is_refused(kind, sshd):
    """A shell that talks for ever is not listened to for ever."""
    error = refused(sshd.profile(kind, command="yes hello; true"))
    assert isinstance(error, Unreachable)
    assert "says no hello" in error.what


def test_an_unknown_host_key_is_refused_with_its_fingerprint(kind, sshd, base):
    """Nothing is sent to a host that nobody vouches for; the message has the fingerprint and the very command."""
    empty = base / "empty"
    empty.touch()
    error = refused(sshd.profile(kind, known_hosts=str(empty)))
    assert isinstance(error, Denied)
    assert "is not known" in error.what
    assert sshd.fingerprint("hostkey") in error.why
    assert f"ssh-keyscan -p {sshd.port} 127.0.0.1 >> {empty}" in error.next
    assert f"ssh -p {sshd.port} {sshd.user}@127.0.0.1" in error.next


def test_a_changed_host_key_is_refused_loudly(kind, sshd):
    """Another key than the known one is an alarm."""
    error = refused(sshd.profile(kind, known_hosts=str(sshd.write_known_hosts("changed", "otherhostkey"))))
    assert isinstance(error, Denied)
    assert "THE HOST KEY OF 127.0.0.1 HAS CHANGED" in error.what
    assert sshd.fingerprint("hostkey") in error.why
    assert f"[127.0.0.1]:{sshd.port}" in error.next


def test_a_revoked_host_key_is_refused(kind, sshd):
    """A key that a @revoked line names is not trusted, although another line knows it."""
    plain = sshd.known_hosts.read_text()
    revoked = sshd.write_known_hosts("revoked", "hostkey", prefix="@revoked ")
    revoked.write_text(revoked.read_text() + plain)
    error = refused(sshd.profile(kind, known_hosts=str(revoked)))
    assert isinstance(error, Denied)
    assert "@revoked" in error.what


def test_a_cert_authority_line_does_not_hide_the_known_key(kind, sshd, environment, slurm_server):
    """Lines that are not understood are passed over, and the rest of the file is read."""
    mixed = sshd.write_known_hosts("mixed", "otherhostkey", prefix="@cert-authority ")
    mixed.write_text(f"{mixed.read_text()}nonsense\n\n{sshd.known_hosts.read_text()}")
    client = client_of(sshd.profile(kind, environment=environment, known_hosts=str(mixed)))
    assert client.get("/v1/hello", Hello).owner == "alice"
    client.close()


def test_a_refused_login_lists_the_keys_tried(kind, sshd):
    """The key's file and fingerprint are in the message."""
    key = sshd.folder / "otherkey"
    error = refused(sshd.profile(kind, identity_file=str(key)))
    assert isinstance(error, Denied)
    assert "refused the login" in error.what
    assert str(key) in error.why
    assert sshd.fingerprint("otherkey") in error.why


def test_a_missing_program_is_answered_with_the_install_command(kind, sshd):
    """The command that installs it there, in our version, is in the message."""
    error = refused(sshd.profile(kind, command="nnsight-hpc-is-not-here"))
    assert isinstance(error, NotFound)
    assert "is not installed on" in error.what
    assert (
        f"ssh -p {sshd.port} {sshd.user}@127.0.0.1 'python3 -m pip install --user \"nnsight-hpc[worker]==0.1.0\"'"
        in error.next
    )
    assert "command = " in error.next
    assert "not found" in error.why


def test_a_program_that_fails_is_quoted(kind, sshd):
    """What it wrote on stderr, and its exit status, are shown."""
    error = refused(sshd.profile(kind, command="echo the disk is full >&2; exit 3; :"))
    assert isinstance(error, Unreachable)
    assert "the disk is full" in error.why
    assert "exit status 3" in error.why


def test_the_bridges_own_error_arrives_as_itself(kind, sshd, environment, base):
    """Where no daemon can be had, the error that the bridge met is raised on the laptop."""
    client = HttpClient(Remote("uni", sshd.profile(kind, environment=environment), start=False).open, peer="uni")
    with pytest.raises(NotFound, match="no daemon runs here for slurm"):
        client.get("/v1/hello", Hello)


def test_another_protocol_is_refused(kind, sshd):
    """A hello of another protocol version ends the conversation."""
    error = refused(sshd.profile(kind, command="""echo '{"protocol": 99, "version": "9.0"}'; sleep 0;"""))
    assert isinstance(error, Incompatible)
    assert "protocol 99" in error.what


def test_a_host_that_does_not_answer_is_unreachable(kind, sshd, base):
    """A closed port gives one clear error."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        error = refused(sshd.profile(kind, port=taken.getsockname()[1]))
    assert isinstance(error, Unreachable)
    assert "cannot be reached" in error.what
    assert "refused" in error.why


class HangsUp(paramiko.ServerInterface):
    """A host whose connection is cut when a key is offered to it."""

    def __init__(self, folder) -> None:
        self._listener, self._key = socket.create_server(("127.0.0.1", 0)), paramiko.RSAKey.generate(2048)
        self.port = self._listener.getsockname()[1]
        self.known_hosts = folder / "known"
        self.known_hosts.write_text(f"[127.0.0.1]:{self.port} {self._key.get_name()} {self._key.get_base64()}\n")
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with self._listener:
            self._stream, _ = self._listener.accept()
        transport = paramiko.Transport(self._stream)
        transport.add_server_key(self._key)
        transport.start_server(server=self, event=threading.Event())

    def get_allowed_auths(self, username):
        return "publickey"

    def check_auth_publickey(self, username, key):
        self._stream.shutdown(socket.SHUT_RDWR)
        return paramiko.AUTH_FAILED


def test_a_connection_that_is_cut_within_the_login_is_lost(kind, sshd, base):
    """Nobody has refused anything: who waits tries again."""
    host = HangsUp(base)
    error = refused(sshd.profile(kind, port=host.port, known_hosts=str(host.known_hosts)))
    assert isinstance(error, Unreachable)
    assert "cannot be reached" in error.what


def test_a_name_that_does_not_resolve_is_unreachable(kind, sshd):
    """So does a host name with a typing error."""
    error = refused(sshd.profile(kind, host="alice@no-such-host.invalid", port=None))
    assert isinstance(error, Unreachable)


def test_a_key_with_a_passphrase_is_not_asked_for_without_a_terminal(kind, sshd, base):
    """Nobody is asked where nobody is: the login is refused and the key is named."""
    locked = base / "locked"
    keygen(locked, passphrase="secret")
    error = refused(sshd.profile(kind, identity_file=str(locked)))
    assert isinstance(error, Denied)
    assert str(locked) in error.why


def test_who_must_not_ask_does_not_ask(sshd, base, monkeypatch):
    """A further stream of ssh, at a terminal: the login that would need a person is refused."""
    monkeypatch.setattr("nnsight_hpc.client.transport.openssh.at_terminal", lambda: True)
    locked = base / "locked"
    keygen(locked, passphrase="secret")
    remote = Remote("uni", sshd.profile("openssh", identity_file=str(locked)), files=True)
    with pytest.raises(Denied, match="refused the login"):
        remote.open(ask=False)


def test_a_held_connection_serves_many_streams(kind, sshd, environment, slurm_server):
    """After `hold`, each stream is one more channel of the one login, and `close` ends it."""
    transport = transport_for("uni", sshd.profile(kind, environment=environment))
    logins = (sshd.folder / "log").read_text().count("Accepted publickey")
    transport.hold()
    assert transport.alive()
    streams = [
        open_stream(transport, f"{sshd.profile(kind, environment=environment).command} bridge", peer="uni")
        for _ in range(3)
    ]
    for stream in streams:
        stream.close()
    transport.close()
    assert not transport.alive()
    assert (sshd.folder / "log").read_text().count("Accepted publickey") - logins == 1


def test_closing_ends_the_bridge_on_the_other_side(kind, sshd, environment, slurm_server, base):
    """When the laptop goes, no process stays on the login node."""
    pid_file = base / "pid"
    profile = sshd.profile(kind, environment=environment)
    client = client_of(sshd.profile(kind, command=f"echo $$ > {pid_file}; exec {profile.command}"))
    client.get("/v1/hello", Hello)
    client.close()
    assert wait_until_gone(int(pid_file.read_text()), 120)


def test_paramiko_jumps_through_a_host_of_ssh_config(sshd, environment, slurm_server, base):
    """HostName, User, Port, IdentityFile and ProxyJump come from ssh's configuration; both hosts' keys are checked."""
    (base / "home" / ".ssh").mkdir()
    (base / "home" / ".ssh" / "config").write_text(
        f"Host gate inner\n  HostName 127.0.0.1\n  User {sshd.user}\n  Port {sshd.port}\n"
        f"  IdentityFile {sshd.folder}/key\nHost inner\n  ProxyJump gate\n"
    )
    logins = (sshd.folder / "log").read_text().count("Accepted publickey")
    client = client_of(sshd.profile("paramiko", environment=environment, host="inner", port=None, identity_file=None))
    assert client.get("/v1/hello", Hello).owner == "alice"
    client.close()
    assert (sshd.folder / "log").read_text().count("Accepted publickey") - logins == 2


def test_a_proxy_command_is_refused_by_paramiko(sshd, base):
    """What paramiko's transport does not do is said, not passed over."""
    (base / "home" / ".ssh").mkdir()
    (base / "home" / ".ssh" / "config").write_text("Host inner\n  ProxyCommand nc %h %p\n")
    error = refused(sshd.profile("paramiko", host="inner"))
    assert isinstance(error, InvalidInput)
    assert "openssh" in error.next
