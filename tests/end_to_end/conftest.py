"""Fixtures: a laptop with a profile for the test cluster."""

import shutil

import pytest

from tests.end_to_end.laptop import Laptop
from tests.end_to_end.owner import Owner

_YIELD = ["export OMPI_MCA_mpi_yield_when_idle=1"]
"""Ranks on the two cores of a test machine: one that waits gives its core to one that computes."""


@pytest.fixture(scope="module")
def laptop(cluster):
    """A laptop with the profile `uni`; the daemon and its jobs are ended afterwards."""
    laptop = Laptop(cluster)
    login = f"alice@{cluster.address('login')}"
    options = ("--identity-file", str(cluster.key("alice")), "--known-hosts", str(cluster.known_hosts), "--default")
    laptop.nnsight("cluster", "add", "uni", login, *options)
    yield laptop
    laptop.nnsight("daemon", "stop", "--workers", check=False)
    cluster.cancel_all_jobs()
    laptop.nnsight("cluster", "remove", "uni")


@pytest.fixture(scope="module")
def owner(cluster):
    """Alice on the login node; tests start her daemon. It and its jobs are ended afterwards."""
    owner = Owner(cluster)
    yield owner
    if owner.answers():
        owner.stop()
    cluster.cancel_all_jobs()
    shutil.rmtree(owner.places.home, ignore_errors=True)


@pytest.fixture(scope="module")
def tiny(cluster, tiny_llama):
    """The tiny Llama where every node can read it."""
    folder = cluster.shared / "tiny-llama"
    shutil.copytree(tiny_llama, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def one(owner, tiny):
    """A pool of one process, which heals from each test."""
    owner.up("one", model=str(tiny), time="01:00:00", mem="1G")
    owner.serving("one")
    return "one"


@pytest.fixture(scope="module")
def two(owner, tiny):
    """A pool of two ranks on two nodes."""
    owner.up("two", model=str(tiny), time="01:00:00", mem="1G", nodes=2, tp=2, setup=_YIELD)
    owner.serving("two")
    return "two"


@pytest.fixture
def between(cluster):
    """A key with which alice gets from one login node to another without a question."""
    ssh = cluster.home("alice") / ".ssh"
    hosts = "".join(f"{host} {cluster.host_key(host)}\n" for host in ("login", "login2"))
    for name, text in (("id_ed25519", cluster.key("alice").read_text()), ("known_hosts", hosts)):
        cluster.run("login", ["sh", "-c", f"umask 077; cat > {ssh / name}"], user="alice", input=text)
    yield
    for name in ("id_ed25519", "known_hosts"):
        (ssh / name).unlink()
