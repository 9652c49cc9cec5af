from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import nnsight_hpc
from nnsight_hpc.wire.errors import InvalidInput, Unreachable
from tests.daemon.process import wait_for

if TYPE_CHECKING:
    from tests.cluster import Cluster

ALLREDUCE = "from mpi4py import MPI; w = MPI.COMM_WORLD; print(w.size, w.allreduce(w.rank))"
CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=60)"
SLURMD_PORT = "6818"


def ssh(cluster: Cluster, target: str, command: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Run OpenSSH on the laptop, with nothing but keys and known hosts to convince it."""
    settings = {"BatchMode": "yes", "StrictHostKeyChecking": "yes", "IdentitiesOnly": "yes", **options}
    argv = ["ssh", *(f"-o{name}={value}" for name, value in settings.items()), target, command]
    return cluster.run("laptop", argv, check=False)


@pytest.mark.parametrize("host", ["login", "login2"])
def test_alice_logs_in_from_the_laptop(cluster: Cluster, host: str) -> None:
    """Through a real sshd, with strict checking of host keys, by name and by address, as herself, with her groups."""
    for target in (host, cluster.address(host)):
        done = ssh(cluster, f"alice@{target}", "id -un; id -Gn; hostname; pwd")
        expected = ["alice", "alice lab", host, str(cluster.home("alice"))]
        assert expected == done.stdout.splitlines(), done.stderr


def test_commands_over_ssh_find_the_project(cluster: Cluster) -> None:
    """A command over SSH, which is no login shell, has the programs of the virtual environment on its PATH."""
    done = ssh(cluster, "alice@login", "command -v nnsight-hpc")
    assert f"{Path(sys.prefix) / 'bin' / 'nnsight-hpc'}\n" == done.stdout


@pytest.mark.parametrize("key", ["stranger", "bob"])
def test_a_wrong_key_is_refused(cluster: Cluster, key: str) -> None:
    """A key of nobody, and another user's key, do not open alice's account."""
    done = ssh(cluster, "alice@login", "true", IdentityFile=cluster.key(key))
    assert done.returncode == 255
    assert "Permission denied (publickey)" in done.stderr


@pytest.mark.parametrize("known", ["", "other"])
def test_an_unknown_or_changed_host_key_is_refused(cluster: Cluster, tmp_path: Path, known: str) -> None:
    """OpenSSH on the laptop refuses a login node that it does not know, or whose key is another node's."""
    file = tmp_path / "known_hosts"
    file.write_text(f"login {cluster.host_key('login2')}\n" if known else "")
    done = ssh(cluster, "alice@login", "true", UserKnownHostsFile=file)
    assert done.returncode == 255
    assert "Host key verification failed." in done.stderr


def test_the_laptop_reaches_login_nodes_only(cluster: Cluster) -> None:
    """What a login node connects to on a compute node, the laptop cannot."""
    target = [cluster.address("n1"), SLURMD_PORT]
    assert cluster.run("login", [sys.executable, "-c", CONNECT, *target]).returncode == 0
    assert (
        "Network is unreachable" in cluster.run("laptop", [sys.executable, "-c", CONNECT, *target], check=False).stderr
    )


def test_no_host_has_a_way_out(cluster: Cluster) -> None:
    """No host has a default route, and none lies in the machine's own network namespace."""
    machine = str(Path("/proc/self/ns/net").readlink())
    for host in cluster.hosts:
        done = cluster.run(host, ["sh", "-c", "ip route show default; readlink /proc/self/ns/net"], user="root")
        (namespace,) = done.stdout.splitlines()
        assert namespace != machine


def test_users_exist_on_the_cluster_only(cluster: Cluster) -> None:
    """Neither the laptop nor the machine knows alice."""
    assert cluster.run("n1", ["id", "-u", "alice"]).stdout == "2001\n"
    assert cluster.run("laptop", ["id", "-u", "alice"], check=False).returncode == 1
    assert subprocess.run(["id", "-u", "alice"], check=False, capture_output=True).returncode == 1


def test_every_user_on_every_host_runs_this_checkout(cluster: Cluster) -> None:
    """Interpreter, virtual environment and checkout are readable wherever they lie on the machine."""
    program = "import nnsight_hpc, mpi4py; print(nnsight_hpc.__file__)"
    for host, user in [("login", "alice"), ("login2", "bob"), ("n1", "bob"), ("n2", "alice"), ("laptop", "root")]:
        assert f"{nnsight_hpc.__file__}\n" == cluster.run(host, ["python", "-c", program], user=user).stdout


def test_homes_are_shared_and_closed(cluster: Cluster) -> None:
    """What alice writes on one host she reads on another and the machine's root reads in place; bob reads nothing."""
    cluster.run("login", ["tee", "note"], input="hello")
    assert cluster.run("n2", ["cat", "note"]).stdout == "hello"
    note = cluster.home("alice") / "note"
    assert note.read_text() == "hello"
    assert "Permission denied" in cluster.run("login", ["cat", note], user="bob", check=False).stderr


def test_shared_is_read_by_all_and_scratch_is_written_by_all(cluster: Cluster) -> None:
    """Models that root puts into `shared` are read-only on the hosts; in `scratch`, users make files of their own."""
    model = cluster.shared / "model.txt"
    model.write_text("weights")
    assert cluster.run("n1", ["cat", model], user="bob").stdout == "weights"
    assert cluster.run("n1", ["touch", model], user="bob", check=False).returncode == 1
    cluster.run("n1", ["touch", cluster.scratch / "bob"], user="bob")
    assert (cluster.scratch / "bob").stat().st_uid == 2002


def test_hosts_have_temporary_folders_of_their_own(cluster: Cluster) -> None:
    """As on real hosts, what lies in /tmp and /dev/shm of one is not there on another, nor on the machine."""
    for folder in ("/tmp", "/dev/shm"):
        path = Path(folder) / f"of-n1-{cluster.name}"
        cluster.run("n1", ["touch", path])
        assert cluster.run("n2", ["test", "-e", path], check=False).returncode == 1
        assert not path.exists()


def test_srun_spans_both_nodes(cluster: Cluster) -> None:
    """A job step of alice runs as her on n1 and n2."""
    done = cluster.run("login", ["srun", "--nodes=2", "sh", "-c", "echo $(hostname) $(id -un)"])
    assert sorted(done.stdout.splitlines()) == ["n1 alice", "n2 alice"]


def test_mpi_spans_both_nodes(cluster: Cluster) -> None:
    """Four ranks on two nodes form one world through PMIx, and sum their ranks."""
    shape = ["--nodes=2", "--ntasks-per-node=2", "--mpi=pmix"]
    done = cluster.run("login", ["srun", *shape, sys.executable, "-c", ALLREDUCE])
    assert done.stdout.splitlines() == ["4 6"] * 4


def test_sbatch_hands_out_gpus(cluster: Cluster) -> None:
    """A batch job runs as the user who submitted it, with the GPUs that it asked for."""
    script = "#!/bin/bash\nid -un\necho $CUDA_VISIBLE_DEVICES\n"
    options = ["--wait", "--gpus-per-node=2", "--output=gpus.txt"]
    cluster.run("login2", ["sbatch", *options], user="bob", input=script)
    assert (cluster.home("bob") / "gpus.txt").read_text() == "bob\n0,1\n"


def test_cancel_all_jobs_empties_the_nodes(cluster: Cluster) -> None:
    """Running jobs of all users are gone, and the nodes idle again."""
    for user in ("alice", "bob"):
        cluster.run("login", ["sbatch", "--output=/dev/null", "--wrap=sleep 300"], user=user)
    cluster.cancel_all_jobs()
    assert cluster.run("login", ["squeue", "--noheader"], user="root").stdout == ""
    cluster.wait_idle()
    assert cluster.sinfo() == {"n1": "idle", "n2": "idle"}


def test_munge_tells_who_is_calling_across_hosts(cluster: Cluster) -> None:
    """A credential that bob makes on a compute node is decoded on a login node as his."""
    credential = cluster.run("n2", ["munge", "--no-input"], user="bob").stdout
    assert "bob (2002)" in cluster.run("login", ["unmunge"], input=credential).stdout


def test_signals_reach_the_program_itself(cluster: Cluster) -> None:
    """The process that `popen` returns is the program, not something around it."""
    process = cluster.popen("login", ["sleep", "300"])
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == -signal.SIGINT


def test_run_ends_the_whole_group_at_a_timeout(cluster: Cluster) -> None:
    """What a program has started in the background ends with it."""
    with pytest.raises(subprocess.TimeoutExpired):
        cluster.run("n1", ["sh", "-c", "sleep 7654 & sleep 7654"], timeout=0.5)
    wait_for(lambda: "7654" not in cluster.run("n1", ["ps", "-eo", "args"]).stdout)


def test_run_shows_what_a_failed_program_wrote(cluster: Cluster) -> None:
    """The error of a failed command names host, output and error output; `check=False` returns them instead."""
    with pytest.raises(subprocess.CalledProcessError) as raised:
        cluster.run("n1", ["sh", "-c", "echo out; echo err >&2; exit 3"])
    assert raised.value.__notes__ == ["on n1\nstdout: out\n\nstderr: err\n"]


def test_the_environment_of_a_user_is_a_clean_login(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the test's own environment passes, but for what is given, and the working folder is the home."""
    monkeypatch.setenv("SECRET", "1")
    lines = cluster.run("login", ["sh", "-c", "env; pwd"], env={"GIVEN": "2"}).stdout.splitlines()
    assert f"HOME={cluster.home('alice')}" in lines
    assert "GIVEN=2" in lines
    assert not [line for line in lines if line.startswith("SECRET")]
    assert lines[-1] == str(cluster.home("alice"))


def test_a_host_loses_power_and_comes_back(cluster: Cluster) -> None:
    """A stopped host has no process left and takes no command; started again, it runs jobs."""
    running = cluster.popen("n1", ["sleep", "300"])
    cluster.stop_host("n1")
    assert running.wait(120) == -signal.SIGKILL
    with pytest.raises(Unreachable, match="n1"):
        cluster.run("n1", ["true"])
    cluster.start_host("n1")
    cluster.wait_idle()
    assert cluster.run("login", ["srun", "--nodelist=n1", "hostname"]).stdout == "n1\n"


def test_a_host_is_cut_off_and_joins_again(cluster: Cluster) -> None:
    """Without its network a node is reached by nobody, and what runs on it runs on; afterwards it is reached again."""
    running, target = cluster.popen("n1", ["sleep", "300"]), [cluster.address("n1"), SLURMD_PORT]
    connect = [sys.executable, "-c", CONNECT, *target]
    cluster.cut_off("n1")
    in_vain = [sys.executable, "-c", CONNECT.replace("timeout=60", "timeout=1"), *target]
    assert cluster.run("login", in_vain, check=False).returncode == 1
    assert running.poll() is None
    cluster.join("n1")
    assert cluster.run("login", connect).returncode == 0
    running.kill()
    running.wait(120)


def test_a_job_of_the_lesser_partition_gives_way(cluster: Cluster) -> None:
    """A job that may not be queued again is ended as preempted when one of the other partition needs its node."""
    options = ["--output=/dev/null", "--nodelist=n1", "--exclusive", "--parsable", "--no-requeue"]
    lesser = cluster.run("login", ["sbatch", *options, "--partition=scavenge", "--wrap=sleep 300"]).stdout.strip()
    while state_of(cluster, lesser) == "PENDING":
        time.sleep(0.2)
    cluster.run("login", ["srun", "--nodelist=n1", "--exclusive", "true"], user="bob")
    assert state_of(cluster, lesser) == "PREEMPTED"


def state_of(cluster: Cluster, job: str) -> str:
    shown = cluster.run("login", ["squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T"])
    return shown.stdout.strip()


def test_a_service_is_killed_and_started_again(cluster: Cluster) -> None:
    """Without its sshd a login node refuses connections; the rest of the host lives on."""
    cluster.stop_service("login2", "sshd")
    assert "Connection refused" in ssh(cluster, "alice@login2", "true").stderr
    assert cluster.run("login2", ["hostname"]).stdout == "login2\n"
    cluster.start_service("login2", "sshd")
    assert ssh(cluster, "alice@login2", "hostname").stdout == "login2\n"


def test_an_unknown_host_is_named(cluster: Cluster) -> None:
    """A misspelt host is an error that lists the hosts."""
    with pytest.raises(InvalidInput, match="no host n3") as raised:
        cluster.run("n3", ["true"])
    assert raised.value.next == "one of laptop, login, login2, n1, n2"
