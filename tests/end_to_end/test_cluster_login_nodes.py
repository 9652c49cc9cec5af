"""Login nodes and laptops that come and go under people who wait: they get what they wait for, and nothing runs twice.

The laptop's profile has the one name of both login nodes, as sites have it in their DNS.
"""

import os
import signal
import sys
import time

import pytest
import torch

from tests.cluster.layout import LOGIN, LOGINS
from tests.end_to_end.laptop import Laptop
from tests.end_to_end.owner import ranks_of, until
from tests.slurm.worker.graphs import talking_frame

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500), pytest.mark.usefixtures("between")]

PROMPT = "the capital of the city is paris"
TOKENS = 1000
"""A generation that takes some seconds."""
SOON = """
from nnsight_hpc.client.transport import paramiko_ssh
paramiko_ssh.KEEPALIVE, paramiko_ssh.DEAD_AFTER_MS = 1, 2000  # otherwise a dead connection is found out in a minute
"""
GENERATE = f"""
import sys, torch
from nnsight_hpc import LanguageModel
length = {{"min_new_tokens": {TOKENS}, "max_new_tokens": {TOKENS}}}  # whatever it draws
with LanguageModel(sys.argv[1]).generate({PROMPT!r}, **length, remote=True, pool="tiny") as tracer:
    tokens = tracer.result.save()
    tracer.log("made", tokens.shape)
torch.save(tokens, sys.argv[2])
"""
COMMAND = """
from nnsight_hpc.client.cli import main
main()
"""


@pytest.fixture(scope="module")
def laptop(cluster):
    laptop = Laptop(cluster)
    keys = ("--identity-file", str(cluster.key("alice")), "--known-hosts", str(cluster.known_hosts))
    laptop.nnsight("cluster", "add", "uni", f"alice@{LOGIN}", *keys, "--default")
    yield laptop
    laptop.nnsight("daemon", "stop", "--workers", check=False)
    cluster.cancel_all_jobs()
    laptop.nnsight("cluster", "remove", "uni")


@pytest.fixture(scope="module")
def pool(laptop, tiny):
    laptop.nnsight("up", "tiny", "--model", str(tiny), "--mem", "1G", "--time", "01:00:00", "--wait", timeout=240)
    return "tiny"


@pytest.fixture
def generating(laptop, owner, pool, tiny, tmp_path):
    """Start a program on the laptop that generates on the pool: its process, its file, and its request, which runs."""

    def start(before=""):
        file = tmp_path / "tokens.pt"
        process = laptop.popen(sys.executable, "-c", before + GENERATE, tiny, file)
        return process, file, until(lambda: running(owner), "a request that runs", 180)

    return start


@pytest.fixture
def elsewhere(cluster):
    """Another machine of alice, with a home of its own."""
    home = cluster.scratch / "elsewhere"
    cluster.run("n2", ["mkdir", "-p", "-m", "700", home])
    known, key = home / "known_hosts", cluster.home("alice") / ".ssh/id_ed25519"
    cluster.run("n2", ["sh", "-c", f"cat > {known}"], input=f"login {cluster.host_key('login')}\n")
    machine = Laptop(cluster, "n2", home)
    machine.nnsight("cluster", "add", "uni", "alice@login", "--identity-file", key, "--known-hosts", known, "--default")
    yield machine
    machine.nnsight("cluster", "remove", "uni")


def running(owner):
    return next((one.id for one in owner.requests() if one.state == "RUNNING"), None)


def attempts(owner, request):
    return owner.story(f"requests/{request}").count("given to a worker")


def age(lease):
    """As if it had not been touched for longer than a daemon waits before it takes one over."""
    past = time.time() - 100
    os.utime(lease, (past, past))


def forget_connections(cluster):
    """End what serves alice's connections: to login nodes that hear nothing more, they are dead.

    On the machine there may be another cluster with an alice of its own; a host sees its own processes only.
    """
    for host in LOGINS:
        cluster.run(host.name, ["pkill", "-KILL", "-u", "alice", "sshd"], user="root", check=False)


def test_who_waits_outlives_the_login_node(laptop, owner, generating, cluster):
    """Its daemon dies and its network is gone: by the other node one gets what ran, and one what was still queued."""
    [worker] = ranks_of(owner.serving("tiny").id).values()
    asking, file, runs = generating(SOON)
    worker.suspend()  # at once, so that it runs still when all is ready
    queued = owner.send(talking_frame(), "tiny")
    waiting = laptop.popen(sys.executable, "-c", SOON + COMMAND, "wait", queued)
    assert queued in waiting.stderr.readline()
    before, states = owner.lease, [owner.request(one).state for one in (runs, queued)]
    cluster.cut_off("laptop")  # so that it hears nothing of what ends
    owner.kill()
    cluster.cut_off("login")
    cluster.join("laptop")
    age(owner.places.lease)
    worker.resume()
    try:
        said = [one.communicate(timeout=200)[1] for one in (waiting, asking)]
    finally:
        cluster.join("login")
    assert (waiting.returncode, asking.returncode) == (0, 0), said
    assert states == ["RUNNING", "QUEUED"]
    assert (before.host, owner.lease.host) == ("login", "login2")
    assert torch.load(file).shape[1] > TOKENS
    assert {one.id: attempts(owner, one.id) for one in owner.requests()} == {runs: 1, queued: 1}


@pytest.mark.parametrize("seconds", [pytest.param(0, id="short"), pytest.param(70, id="long", marks=pytest.mark.long)])
def test_a_laptop_that_slept_gets_its_values(owner, generating, elsewhere, cluster, seconds):
    """Its program stood still and its connection is dead; meanwhile another machine has what it asked for by the id."""
    asking, file, request = generating("" if seconds else SOON)
    asking.send_signal(signal.SIGSTOP)
    cluster.cut_off("laptop")
    forget_connections(cluster)
    try:
        assert "tokens" in elsewhere.nnsight("result", request).stdout
        assert elsewhere.nnsight("logs", request).stdout.startswith("made")
        time.sleep(seconds)
    finally:
        cluster.join("laptop")
        asking.send_signal(signal.SIGCONT)
    said = asking.communicate(timeout=200)[1]
    assert asking.returncode == 0, said
    assert torch.load(file).shape[1] > TOKENS
    assert attempts(owner, request) == 1
