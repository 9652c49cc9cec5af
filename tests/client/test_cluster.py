"""From the laptop of the test cluster, through its real sshd, to a real daemon: the command line as a researcher uses it."""

from __future__ import annotations

import json
import sys

import pytest


@pytest.fixture(scope="module")
def call(cluster):
    """Run the program on the laptop; its exit code, stdout and stderr. The daemon is stopped in the end."""

    def call(*arguments: str, name: str = "paramiko"):
        command = [sys.executable, "-m", "nnsight_hpc.client", "-c", name, *arguments]
        done = cluster.run("laptop", command, env={"HOME": str(cluster.laptop_home)}, check=False)
        return done.returncode, done.stdout, done.stderr

    for name in ("paramiko", "openssh"):
        options = ["--identity-file", str(cluster.key("alice")), "--known-hosts", str(cluster.known_hosts)]
        code, _, errors = call(
            "cluster", "add", name, f"alice@{cluster.address('login')}", "--transport", name, *options
        )
        assert code == 0, errors
    yield call
    call("daemon", "stop", "--workers")
    for name in ("paramiko", "openssh"):
        call("cluster", "remove", name)


@pytest.mark.parametrize("name", ["paramiko", "openssh"])
def test_the_bridge_starts_a_daemon_of_the_user_on_the_login_node(call, name):
    """One command from the laptop: the daemon is alice's, for Slurm, on the login node."""
    code, output, errors = call("--json", "daemon", "start", name=name)
    assert code == 0, errors
    hello = json.loads(output)
    assert (hello["owner"], hello["host"], hello["executor"]) == ("alice", "login", "slurm")


def test_both_transports_find_the_same_daemon(call):
    """What one started the other one sees, also over a connection that is held."""
    first = json.loads(call("--json", "daemon", "start")[1])
    assert call("connect", "--background", name="openssh")[0] == 0
    assert json.loads(call("--json", "status", name="openssh")[1])["hello"] == first
    assert call("disconnect", name="openssh")[0] == 0


@pytest.mark.parametrize("transport", ["paramiko", "openssh"])
@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ("key", 6, "refused the login"),
        ("host", 6, "is not known"),
        ("command", 4, "is not installed on"),
    ],
    ids=["refused login", "unknown host key", "missing program"],
)
def test_bad_input_gives_one_clear_message(call, cluster, *, transport, change, code, words):
    """Each of the ways in which a first login goes wrong has its words and its exit code."""
    key = cluster.key("stranger" if change == "key" else "alice")
    address = f"{'::ffff:' if change == 'host' else ''}{cluster.address('login')}"  # the same host by a name of its own
    command = "/opt/absent/nnsight-hpc" if change == "command" else "nnsight-hpc"
    options = ["--transport", transport, "--identity-file", str(key), "--command", command]
    call("cluster", "add", "bad", f"alice@{address}", *options)
    try:
        found, output, errors = call("status", name="bad")
    finally:
        call("cluster", "remove", "bad")
    assert (found, output) == (code, "")
    assert words in errors
    assert errors.count("Error: ") == 1
    assert "Traceback" not in errors
