"""How clusters begin and end, also badly."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from nnsight_hpc.wire.errors import Unreachable
from tests.cluster import Cluster, cleanup
from tests.cluster.furnishing import REPOSITORY
from tests.cluster.layout import BASE
from tests.cluster.leaks import Session, difference
from tests.cluster.process import ProcessId, identify

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.cluster

UP_AND_WAIT = "import time; from tests.cluster import Cluster; print(Cluster.up().name, flush=True); time.sleep(600)"
UP_AND_ABANDON = """
import os
from tests.cluster import Cluster
from tests.cluster.process import identify

cluster = Cluster.up()
cluster.keep()
cluster._record.owner = identify(os.getpid())
cluster._record.save()
print(cluster.name)
"""
WAITING_TEST = "import time\n\ndef test(cluster):\n    print(cluster.name, flush=True)\n    time.sleep(600)\n"
FAILING_TEST = "def test(cluster):\n    print(cluster.name, flush=True)\n    assert cluster.hosts == []\n"
LITTERING_TEST = (
    "import subprocess\n\ndef test():\n    subprocess.run(['sh', '-c', 'setsid sleep 300 >/dev/null & echo $!'])\n"
)


def python(*arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, *map(str, arguments)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)


def pytest_on(file: Path) -> subprocess.Popen[str]:
    """A test session of its own, whose tests write straight to its output."""
    quiet = ["-qq", "--no-header", "--no-summary", "--capture=no", "--noconftest", "-p", "no:cacheprovider"]
    where = ["-c", "/dev/null", f"--rootdir={file.parent}", f"--basetemp={file.parent / 'base'}"]
    return python("-m", "pytest", *quiet, *where, "-p", "tests.cluster.plugin", file)


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def hosts_of(name: str) -> list[ProcessId]:
    record = cleanup.find(name)
    assert record is not None
    assert len(record.hosts) == 6  # the switch is one, too
    assert all(init.alive() for init in record.hosts.values())
    return list(record.hosts.values())


def wait_until_ended(processes: list[ProcessId]) -> None:
    end = time.monotonic() + 120
    while any(process.alive() for process in processes):
        assert time.monotonic() < end, "hosts are still up"
        time.sleep(0.05)


def test_up_and_down_leave_no_trace(test_session: Session) -> None:
    """Twice over, a cluster and what runs on it are seen while it is up, and are gone afterwards."""
    before = test_session.snapshot()
    for _ in range(2):
        with Cluster.up() as cluster:
            cluster.run("n1", ["sh", "-c", "setsid sleep 300 >/dev/null 2>&1 &"])
            seen = difference(before, test_session.snapshot())
            assert {f"cluster {cluster.name}"} <= set(seen)
            assert [line for line in seen if line.endswith("sleep 300")]
            assert [line for line in seen if line.startswith("namespace net:")]
        assert test_session.leaks(before) == []
        assert not BASE.joinpath(cluster.name).exists()


def test_slurm_options_and_readable_paths(tmp_path: Path) -> None:
    """Settings reach slurm.conf; a file below two closed folders is opened to users, and its neighbour is not."""
    inner = tmp_path / "closed" / "deep"
    inner.mkdir(parents=True)
    inner.chmod(0o700)
    inner.parent.chmod(0o700)
    (inner / "wanted").write_text("read me")
    (inner / "neighbour").write_text("not me")
    with Cluster.up(slurm_options={"MinJobAge": "7"}, readable=[inner / "wanted"]) as cluster:
        assert "MinJobAge               = 7 sec" in cluster.run("login", ["scontrol", "show", "config"]).stdout
        assert cluster.run("n2", ["cat", inner / "wanted"], user="bob").stdout == "read me"
        assert cluster.run("n2", ["test", "-e", inner / "neighbour"], user="bob", check=False).returncode == 1
    assert (inner / "wanted").read_text() == "read me"


def test_a_cluster_that_cannot_start_says_why_and_leaves_nothing(test_session: Session) -> None:
    """A setting that slurmctld refuses is shown from its log, and everything is removed."""
    before = test_session.snapshot()
    with pytest.raises(Unreachable, match="slurmctld on login ended") as raised:
        Cluster.up(slurm_options={"SelectType": "select/nonsense"})
    assert "select/nonsense" in raised.value.why
    assert test_session.leaks(before) == []


def test_a_killed_process_takes_its_cluster_along() -> None:
    """After SIGKILL of the owner the hosts end by themselves; the next start removes the files."""
    owner = python("-c", UP_AND_WAIT)
    name = first_line(owner)
    hosts = hosts_of(name)
    owner.kill()
    owner.communicate()
    wait_until_ended(hosts)
    cleanup.sweep()  # another cluster that starts on this machine may have done it
    assert cleanup.find(name) is None
    assert not BASE.joinpath(name).exists()


def test_a_sweep_ends_hosts_that_outlived_their_owner() -> None:
    """Hosts that did not notice that their owner is gone are ended by the sweep."""
    with python("-c", UP_AND_ABANDON) as owner:
        name = first_line(owner)
    hosts = hosts_of(name)
    assert all(host.alive() for host in hosts)
    cleanup.sweep()
    assert not any(host.alive() for host in hosts)


def test_a_sweep_spares_clusters_that_are_in_use(cluster: Cluster) -> None:
    """The cluster of a living process, and one that was started by hand, stay."""
    assert cluster.name not in cleanup.sweep()
    assert cluster.run("login", ["hostname"]).stdout == "login\n"


def test_by_hand() -> None:
    """`up` leaves a cluster behind its process, `status` and `shell` find it, `down` removes it."""
    command = ["-m", "tests.cluster", "--name", "by-hand-test"]
    with python(*command, "up") as up:
        assert up.wait(120) == 0
    try:
        hosts = hosts_of("by-hand-test")
        assert "by-hand-test" not in cleanup.sweep()
        status, _ = python(*command, "status").communicate(timeout=120)
        assert "login2   10.78.0.20   up" in status.splitlines()
        shell = [sys.executable, *command, "shell", "n1", "bob"]
        done = subprocess.run(
            shell, cwd=REPOSITORY, input="id -un; hostname", capture_output=True, text=True, check=False
        )
        assert done.stdout == "bob\nn1\n"
    finally:
        down, _ = python(*command, "down").communicate(timeout=120)
    assert "removed: by-hand-test" in down
    assert not any(host.alive() for host in hosts)


@pytest.mark.parametrize(("program", "ending", "code"), [(WAITING_TEST, signal.SIGINT, 2), (FAILING_TEST, None, 1)])
def test_a_session_removes_its_cluster(tmp_path: Path, program: str, ending: signal.Signals | None, code: int) -> None:
    """Ctrl-C, and a failed test, end with the cluster removed."""
    file = tmp_path / "test_nested.py"
    file.write_text(program)
    with pytest_on(file) as session:
        name = first_line(session)
        if ending is not None:
            session.send_signal(ending)
        assert session.wait(120) == code
    assert cleanup.find(name) is None
    assert not BASE.joinpath(name).exists()


def test_a_session_that_leaves_a_process_fails(tmp_path: Path) -> None:
    """A process that outlives the session's last test is an error of the session, though all tests passed."""
    file = tmp_path / "test_nested.py"
    file.write_text(LITTERING_TEST)
    with pytest_on(file) as session:
        left = identify(int(first_line(session)))
        assert session.wait(120) == 1
    assert left is not None
    left.end()
