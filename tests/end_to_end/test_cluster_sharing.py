"""Two Unix users and one daemon: alice shares hers, bob comes from the laptop by his own SSH login and bridge."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nnsight_hpc.client.hello import read_hello
from nnsight_hpc.wire.errors import Denied
from nnsight_hpc.wire.http import HttpClient
from nnsight_hpc.wire.messages import DatasetFile, DatasetStatus, Hello, RequestStatus, Story
from nnsight_hpc.wire.names import new_request_id
from nnsight_hpc.wire.places import places_at
from nnsight_hpc.wire.pools import PoolStatus, Status
from nnsight_hpc.wire.states import RequestState
from tests.slurm.worker.graphs import capture_frame, dump_frame

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

_SSH = ("ssh", "-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes")
LISTEN = """
import os, socket, sys
os.mkdir(sys.argv[1], 0o755)
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1] + "/slurm-00000000.sock")
listener.listen()
print("listens", flush=True)
sys.stdin.read()
"""


class Person:
    """A user of the cluster at the laptop, with one connection to alice's daemon: ssh, sshd, bridge."""

    def __init__(self, cluster, name):
        self._cluster, self._name = cluster, name
        self.http = HttpClient(self._open, peer=f"alice's daemon, for {name}")

    def _open(self):
        ours, theirs = socket.socketpair()
        options = ("-i", str(self._cluster.key(self._name)), "-o", f"UserKnownHostsFile={self._cluster.known_hosts}")
        login = f"{self._name}@{self._cluster.address('login')}"
        with theirs:
            command = [*_SSH, *options, login, "nnsight-hpc bridge --owner alice"]
            self._cluster.popen("laptop", command, stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL)
        read_hello(ours, peer=f"the bridge of {self._name}")
        return ours

    def send(self, frame):
        request = new_request_id()
        self.http.put(f"/v1/requests/{request}?pool=tiny", frame, RequestStatus)
        return request

    def ended(self, request):
        """The status of a request once it has ended."""
        while not (status := self.http.get(f"/v1/requests/{request}?wait=30", RequestStatus)).state.ended:
            pass
        return status


@pytest.fixture(scope="module")
def home(cluster):
    """The home of alice's daemon, in which she has let bob in."""
    home = places_at(cluster.home("alice") / ".local/state/nnsight-hpc/slurm")
    script = f"mkdir -p {home.home} && printf '[share]\\nusers = [\"bob\"]\\n' > {home.settings}"
    cluster.run("login", ["bash", "-c", script], user="alice")
    yield home
    home.settings.unlink()


@pytest.fixture(scope="module")
def lab(home, laptop, cluster):
    """The laptop's profile of bob, which names alice as the owner."""
    options = (
        "--identity-file",
        str(cluster.key("bob")),
        "--known-hosts",
        str(cluster.known_hosts),
        "--owner",
        "alice",
    )
    laptop.nnsight("cluster", "add", "lab", f"bob@{cluster.address('login')}", *options)
    yield laptop
    laptop.nnsight("cluster", "remove", "lab")


@pytest.fixture(scope="module")
def pool(lab, tiny):
    lab.nnsight("up", "tiny", "--model", str(tiny), "--mem", "1G", "--wait", timeout=240)


@pytest.fixture(scope="module")
def alice(pool, cluster):
    return Person(cluster, "alice")


@pytest.fixture(scope="module")
def bob(pool, cluster):
    return Person(cluster, "bob")


def test_the_bridge_of_another_user_starts_no_daemon(lab, home):
    """Without alice's daemon bob is told whom to ask, and nothing has begun, neither hers nor his."""
    ended = lab.nnsight("-c", "lab", "daemon", "start", check=False)
    assert ended.returncode == 4
    assert "alice shares no daemon on login" in ended.stderr
    assert not home.lease.exists()


def test_both_use_one_daemon_each_as_himself(alice, bob):
    """The kernel's names, by way of two sshd sessions."""
    hers, his = (person.http.get("/v1/hello", Hello) for person in (alice, bob))
    assert ((hers.user, hers.owner), (his.user, his.owner)) == (("alice", "alice"), ("bob", "alice"))
    assert hers.pid == his.pid


def test_bobs_request_runs_on_alices_pool_and_is_his(alice, bob):
    """It comes back to him; alice, as the owner, sees it; hers he neither sees, reads nor ends."""
    his, hers = bob.send(capture_frame()), alice.send(capture_frame())
    assert [person.ended(name).state for person, name in ((bob, his), (alice, hers))] == [RequestState.COMPLETED] * 2
    assert b"hidden" in bob.http.call("GET", f"/v1/requests/{his}/result")
    assert alice.http.get(f"/v1/requests/{his}", RequestStatus).user == "bob"
    assert [one.id for one in bob.http.get("/v1/status", Status).requests] == [his]
    assert {his, hers} <= {one.id for one in alice.http.get("/v1/requests", list[RequestStatus])}
    for method, part in (("GET", ""), ("GET", "/result"), ("GET", "/log"), ("GET", "/story"), ("DELETE", "")):
        with pytest.raises(Denied, match="is somebody else's"):
            bob.http.call(method, f"/v1/requests/{hers}{part}")
    assert bob.http.get(f"/v1/requests/{his}/story", Story).events


def test_bobs_dataset_is_his(alice, bob):
    """He fetches what he has dumped; of alice's he sees nothing, and cannot go on with it or remove it."""
    names = {alice: "hers", bob: "his"}
    for person, name in names.items():
        frame, request = dump_frame(["one two three"], ("model.layers.0.output",), name), new_request_id()
        person.http.put(f"/v1/datasets/{name}?pool=tiny&request={request}", frame, RequestStatus)
        assert person.ended(request).state == RequestState.COMPLETED
    assert [one.name for one in bob.http.get("/v1/datasets", list[DatasetStatus])] == ["his"]
    [file, *_] = bob.http.get("/v1/datasets/his/files", list[DatasetFile])
    assert len(bob.http.call("GET", f"/v1/datasets/his/files/{file.path}")) == file.size
    for method, part in (("GET", ""), ("GET", "/files"), ("GET", f"/files/{file.path}"), ("DELETE", "")):
        with pytest.raises(Denied, match="dataset hers is somebody else's"):
            bob.http.call(method, f"/v1/datasets/hers{part}")


def test_the_files_are_alices_alone(bob, home, cluster):
    """What all users have sent and got lies where bob cannot look, and so do the secret and the log."""
    for path in (home.secret, home.log, home.requests, home.datasets, home.settings):
        done = cluster.run("login", ["ls", str(path)], user="bob", check=False)
        assert (done.returncode != 0, "Permission denied" in done.stderr) == (True, True)


@pytest.mark.parametrize("words", ["down tiny", "up tiny", "daemon stop --workers", "daemon logs", "gc", "logs tiny"])
def test_what_is_the_owners_is_refused_in_one_clear_message(lab, bob, tiny, words):
    """Exit code 6, whose it is and who he is; the pool serves on."""
    options = ["--model", str(tiny)] if words.startswith("up") else []
    ended = lab.nnsight("-c", "lab", *words.split(), *options, check=False)
    assert ended.returncode == 6, ended.stderr
    assert "only alice, whose daemon this is, may do that" in ended.stderr
    assert "you are bob" in ended.stderr
    assert bob.http.get("/v1/pools/tiny", PoolStatus).desired == 1


def test_a_socket_of_an_impostor_is_not_used(cluster):
    """Whoever comes first can make the folder of that name; who listens there is the kernel's word."""
    folder = "/tmp/nnsight-hpc-2002-shared"
    impostor = cluster.popen(
        "login", [sys.executable, "-c", LISTEN, folder], user="alice", stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert impostor.stdout.readline() == b"listens\n"
    command = [sys.executable, "-m", "nnsight_hpc.client", "bridge", "--owner", "bob"]
    ended = cluster.run("login", command, user="alice", check=False)
    impostor.communicate()
    cluster.run("login", ["rm", "-r", folder], user="alice")
    assert (ended.returncode, json.loads(ended.stdout)["what"]) == (6, "it is not bob who listens there")


@pytest.fixture
def elsewhere(lab, cluster):
    """Profiles of alice and bob by way of the other login node."""
    for name, options in (("alice", ()), ("bob", ("--owner", "alice"))):
        keys = ("--identity-file", str(cluster.key(name)), "--known-hosts", str(cluster.known_hosts))
        lab.nnsight("cluster", "add", f"{name}2", f"{name}@{cluster.address('login2')}", *keys, *options)
    yield lab
    for name in ("alice2", "bob2"):
        lab.nnsight("cluster", "remove", name)


def test_the_other_login_node_leads_to_the_daemon(elsewhere, alice, between):
    """By the lease, and by ssh from there to here; the daemon is the one that runs."""
    hello = json.loads(elsewhere.nnsight("-c", "alice2", "status", "--json").stdout)["hello"]
    assert (hello["host"], hello["pid"]) == ("login", alice.http.get("/v1/hello", Hello).pid)


def test_where_ssh_does_not_get_there_the_daemons_host_is_named(elsewhere, alice):
    """Alice without a key there, and bob, who cannot read the lease: what to do is said."""
    ended = elsewhere.nnsight("-c", "alice2", "daemon", "start", check=False)
    assert (ended.returncode, "on another login node, login" in ended.stderr) == (5, True), ended.stderr
    assert "host = user@login" in ended.stderr
    ended = elsewhere.nnsight("-c", "alice2", "daemon", "status", check=False)
    assert (ended.returncode, "the last one ran on login" in ended.stderr) == (4, True), ended.stderr
    ended = elsewhere.nnsight("-c", "bob2", "status", check=False)
    assert (ended.returncode, "or on which login node it runs" in ended.stderr) == (4, True), ended.stderr


def test_who_is_not_let_in_any_more_is_refused(lab, alice, bob, home):
    """Alice takes bob's name out and starts her daemon again: pools live on, and bob finds no daemon that is shared."""
    text = home.settings.read_text()
    home.settings.write_text("")
    try:
        lab.nnsight("daemon", "stop")
        lab.nnsight("daemon", "start")
        ended = lab.nnsight("-c", "lab", "status", check=False)
        assert (ended.returncode, "alice shares no daemon" in ended.stderr) == (4, True)
        socket_path = Path(json.loads(home.lease.read_bytes())["socket"])
        assert not socket_path.is_relative_to("/tmp/nnsight-hpc-2001-shared")
        assert alice.http.get("/v1/pools/tiny", PoolStatus).desired == 1
    finally:
        home.settings.write_text(text)
