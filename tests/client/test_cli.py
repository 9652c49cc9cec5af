"""The commands, against a daemon that speaks the contract: what they send, print, and end with."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time

import msgspec
import pytest
from click.testing import CliRunner

from nnsight_hpc.client import config
from nnsight_hpc.client.cli import COMMANDS, program
from nnsight_hpc.wire.errors import Conflict, ErrorReport
from nnsight_hpc.wire.frames import unpack
from nnsight_hpc.wire.messages import DumpSpec, LogLine, PoolSpec, PoolStatus, ReplicaStatus, RequestStatus, decode
from nnsight_hpc.wire.states import ReplicaState, RequestState
from tests.client.sshd import PROGRAM as INSTALLED
from tests.client.sshd import keygen

PROGRAM = [sys.executable, "-m", "nnsight_hpc.client"]
HEAVY = {"torch", "numpy", "paramiko", "aiohttp", "zarr", "rich", "cryptography", "transformers"}


def call(*arguments: str, code: int = 0):
    """A command's stdout and stderr; it must end with `code`."""
    done = CliRunner().invoke(program, list(arguments))
    assert done.exit_code == code, done.output
    return done.stdout, done.stderr


def answer(*arguments: str, code: int = 0):
    return json.loads(call("--json", *arguments, code=code)[0])


def replica(state: ReplicaState, name: str = "smol-1", **more) -> ReplicaStatus:
    return ReplicaStatus(id=name, pool="smol", state=state, job_id="17", submitted=time.time(), **more)


def pool(server, *replicas: ReplicaStatus) -> None:
    server.pools["smol"] = PoolStatus(spec=PoolSpec(name="smol", model="m"), desired=1, replicas=replicas)


# -- help and imports --------------------------------------------------------------------------------------------


def test_the_short_helps_are_the_commands_own():
    """The table that spares `--help` the imports says what the commands say."""
    for commands in COMMANDS.values():
        for name, (_, text) in commands.items():
            assert program.get_command(None, name).help.split("\n\n")[0].strip() == text


def test_every_command_and_subcommand_has_help():
    """No option and no command is without a word."""
    for name in program.list_commands(None):
        command = program.get_command(None, name)
        for each in [command, *getattr(command, "commands", {}).values()]:
            assert each.help
            assert [p.name for p in each.params if p.param_type_name == "option" and not p.help] == []
            assert {"cluster", "json"} <= {p.name for p in each.params} or hasattr(each, "commands")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["status"], ["up", "--help"], ["cluster", "list"]])
def test_quick_answers_load_nothing_heavy(base, arguments):
    """No torch, and nothing else that takes its time, for help, the version and `status` of this machine."""
    code = f"""
import sys
from nnsight_hpc.client import config
from nnsight_hpc.client.cli import program
try:
    program.main({arguments!r})
except SystemExit:
    print(*sorted({{name.split(".")[0] for name in sys.modules}}), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert HEAVY & set(done.stderr.splitlines()[-1].split()) == set()


def test_the_installed_program_says_its_version():
    """The entry point of the package works."""
    done = subprocess.run([INSTALLED, "--version"], check=True, capture_output=True, text=True)
    assert re.fullmatch(r"nnsight-hpc \d+\.\d+\.\d+\S*\n", done.stdout)


# -- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nonsense"], 2, "No such command"),
        (["up"], 2, "Missing argument"),
        (["up", "smol"], 2, "--model"),
        (["up", "a/b", "--model", "m"], 2, "cannot be the name"),
        (["-c", "nope", "status"], 4, "there is no cluster 'nope'"),
        (["status"], 4, "no daemon runs"),
        (["dump", "smol", "absent.txt", "--capture", "x", "--name", "n"], 4, "no such corpus"),
        (["run", "absent.json"], 2, "absent.json"),
        (["cancel", "17"], 2, "not the id of a request"),
        (["connect"], 2, "this machine"),
        (["cluster", "add", "x", "-oProxyCommand=evil"], 2, "No such option"),
        (["cluster", "add", "x", "two words"], 2, "not a host"),
    ],
)
def test_a_wrong_call_gives_one_message_and_its_exit_code(base, arguments, code, words):
    """Words on stderr, nothing on stdout, never a traceback."""
    output, errors = call(*arguments, code=code)
    assert output == ""
    assert words in errors
    assert "Traceback" not in errors


def test_with_json_an_error_is_json_too(base):
    """A program that reads stdout learns the kind and the parts of the message."""
    report = msgspec.convert(answer("-c", "nope", "status", code=4)["error"], ErrorReport)
    assert (report.kind, report.what) == ("NotFound", "there is no cluster 'nope'")


def test_json_may_stand_after_the_command(server):
    """`status --json` is `--json status`."""
    assert json.loads(call("status", "--json")[0]) == answer("status")


def test_a_defect_is_told_in_words(server, monkeypatch):
    """What nobody foresaw is no bare traceback either."""
    monkeypatch.setattr("nnsight_hpc.client.app.App.client", lambda *_, **__: 1 / 0)
    _, errors = call("requests", code=1)
    assert errors.startswith("Error: a defect in nnsight-hpc: ZeroDivisionError")
    assert "NNSIGHT_HPC_DEBUG=1" in errors


def test_a_closed_pipe_is_no_error_message(server):
    """`nnsight-hpc … | head` is quiet."""
    shell = f"{' '.join(PROGRAM)} status | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], check=False, capture_output=True, text=True)
    assert (done.returncode in (0, 1), done.stderr) == (True, "")


# -- clusters ----------------------------------------------------------------------------------------------------


def test_clusters_are_added_listed_and_removed(base):
    """What was added is listed, with a star where it is the default."""
    call("cluster", "add", "uni", "alice@login", "--port", "2222", "--transport", "openssh", "--default")
    lines = call("cluster", "list")[0].splitlines()
    assert [line.split() for line in lines] == [
        ["NAME", "HOST", "TRANSPORT", "COMMAND"],
        ["local", "this", "machine"],
        ["uni", "*", "alice@login", "openssh", "nnsight-hpc"],
    ]
    assert "there is a cluster 'uni' already" in call("cluster", "add", "uni", "bob@login", code=5)[1]
    call("cluster", "remove", "uni")
    assert answer("cluster", "list") == {}


# -- pools -------------------------------------------------------------------------------------------------------


def test_up_sends_the_options_and_says_job_and_reason(server):
    """All of `PoolSpec` can be given, and what Slurm says comes back in words."""
    server.replicas = [replica(ReplicaState.PENDING, reason="waits for other jobs (Priority)")]
    options = "--replicas 2 --nodes 3 --tasks-per-node 4 --gpus-per-node 4 --gres gpu:4 --cpus-per-task 8 --mem 16G"
    names = "--time 2:00:00 --partition p --account a --qos q --constraint c --reservation r --mpi pmix"
    more = [
        "--dtype",
        "bfloat16",
        "--revision",
        "v1",
        "--setup",
        "module load x",
        "--setup",
        "y",
        "--sbatch-arg=--nice",
    ]
    output, _ = call("up", "smol", "--model", "/models/m", *options.split(), *names.split(), *more)
    assert output == "Pool smol: pending job 17: waits for other jobs (Priority)\n"
    assert server.pools["smol"].spec == PoolSpec(
        name="smol", model="/models/m", replicas=2, nodes=3, tasks_per_node=4, gpus_per_node=4, gres="gpu:4",
        cpus_per_task=8, mem="16G", time="2:00:00", partition="p", account="a", qos="q", constraint="c", reservation="r",
        mpi="pmix", dtype="bfloat16", revision="v1", setup=("module load x", "y"), sbatch_args=("--nice",),
    )  # fmt: skip


def test_a_models_folder_here_is_sent_as_an_absolute_path(server, tmp_path, monkeypatch):
    """The local daemon has another working folder."""
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    call("up", "smol", "--model", "model")
    assert server.pools["smol"].spec.model == str(tmp_path / "model")


def test_up_wait_returns_when_the_replica_serves(server):
    """It waits through pending and loading; what ended before is not held against it."""
    pool(server, replica(ReplicaState.ENDED, "smol-0", reason="cancelled"))
    server.replicas = [
        replica(ReplicaState.PENDING),
        replica(ReplicaState.LOADING, loaded=5, total=10),
        replica(ReplicaState.READY, host="n1"),
    ]
    assert call("up", "smol", "--model", "m", "--wait")[0] == "Pool smol: ready job 17 on n1\n"


def test_up_wait_fails_with_the_log_of_a_replica_that_ended(server):
    """A job that ends before it serves: its reason and its last lines, and exit code 9."""
    server.log = "OSError: /models/absent does not exist\n"
    server.replicas = [replica(ReplicaState.STARTING), replica(ReplicaState.ENDED, reason="exit code 1")]
    _, errors = call("up", "smol", "--model", "/models/absent", "--wait", code=9)
    assert "ended before it could serve" in errors
    assert "exit code 1" in errors
    assert "OSError: /models/absent does not exist" in errors


def test_up_wait_does_not_mind_the_end_of_replicas_that_make_way(server):
    """One that drains already (after `down`), and one of the old model, end while the new one loads."""
    pool(server, replica(ReplicaState.DRAINING, "smol-0"))
    server.replicas = [
        replica(ReplicaState.PENDING),
        replica(ReplicaState.ENDED, "smol-0", reason="drained"),
        replica(ReplicaState.READY),
    ]
    assert call("up", "smol", "--model", "m", "--wait")[0] == "Pool smol: ready job 17\n"
    pool(server, replica(ReplicaState.LOADING))
    server.replicas = [
        replica(ReplicaState.PENDING, "smol-2"),
        replica(ReplicaState.ENDED, reason="cancelled"),
        replica(ReplicaState.READY, "smol-2"),
    ]
    assert call("up", "smol", "--model", "other", "--wait")[0] == "Pool smol: ready job 17\n"


def test_up_says_why_a_pool_is_held(server):
    """The daemon's own reason for starting no more replicas is the command's error."""
    pool(server)
    held = Conflict("the pool is held").report()
    server.pools["smol"] = msgspec.structs.replace(server.pools["smol"], held=held)
    assert "held: the pool is held" in call("status")[0]


def test_down_ends_the_pool(server):
    """With --wait it returns when nothing is left."""
    pool(server, replica(ReplicaState.READY))
    assert call("down", "smol", "--wait")[0] == "Pool smol: it has ended.\n"
    assert server.pools == {}
    assert "there is no pool 'smol'" in call("down", "smol", code=4)[1]


def test_logs_prints_the_pools_log(server):
    """And names the pools where there is none of that name."""
    pool(server)
    assert call("logs", "smol")[0] == "the replica's log\n"
    assert "there are: smol" in call("logs", "other", code=4)[1]


def test_logs_shows_what_a_request_says(server):
    """So far, or with -f until its end; nothing else of a pool can be followed."""
    name = "r-abcdefgh2345"
    server.requests[name] = RequestStatus(id=name, kind="run", pool="smol", state=RequestState.RUNNING, user="alice")
    server.said[name] = [LogLine(text=f"line {number}", source="x.py:3: log(…)") for number in range(3)]
    server.hold.clear()
    assert call("logs", name)[0] == "line 0\nline 1\nline 2\n"
    server.hold.set()
    assert call("logs", name, "-f")[0] == "line 0\nline 1\nline 2\n"
    assert server.requests[name].state == RequestState.COMPLETED
    said = answer("logs", name)
    assert (said["request"], said["log"][2]["text"], said["log"][2]["source"]) == (name, "line 2", "x.py:3: log(…)")
    assert "no request" in call("logs", "r-zzzzzzzz2345", code=4)[1]
    assert "can be followed" in call("logs", "smol", "-f", code=2)[1]


@pytest.mark.parametrize(("given", "expected"), [("500", 500), ("2K", 2048), ("3m", 3 << 20), ("8G", 8 << 30)])
def test_up_takes_the_memory_of_a_request(server, given, expected):
    """As Slurm writes sizes."""
    call("up", "smol", "--model", "m", "--request-memory", given)
    assert server.pools["smol"].spec.request_memory == expected


@pytest.mark.parametrize("given", ["", "G", "8X", "-1", "1.5G", "8GB"])
def test_up_refuses_what_is_no_size(base, given):
    """And says what one looks like."""
    assert "500M or 8G" in call("up", "smol", "--model", "m", "--request-memory", given, code=2)[1]


def test_status_shows_pools_and_requests(server):
    """Every pool's replicas and every request have a line."""
    pool(server, replica(ReplicaState.PENDING, reason="waits for its turn"))
    error = Conflict("no luck").report()
    server.requests["r-a"] = RequestStatus(
        id="r-a", kind="run", pool="smol", state=RequestState.FAILED, user="alice", error=error, times={"FAILED": 1.0}
    )
    output, _ = call("status")
    assert "pending job 17: waits for its turn" in output
    assert "no luck" in output
    ageless = [re.sub(r"[\d:]+ ago", "ago", text) for text in (output, call("-c", "local", "status")[0])]
    assert ageless[0] == ageless[1]


# -- requests ----------------------------------------------------------------------------------------------------


@pytest.fixture
def tensors(tmp_path):
    header = b'{"x":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'
    path = tmp_path / "in.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\1\2\3\4")
    return path


@pytest.fixture
def graph(tmp_path):
    path = tmp_path / "graph.json"
    path.write_text('{"format": "a graph"}')
    return path


def test_run_sends_graph_and_tensors_and_writes_the_result(server, graph, tensors, tmp_path):
    """The frame holds both files' bytes; the values are printed, the tensors written."""
    pool(server)
    out = tmp_path / "out.safetensors"
    output, errors = call("run", str(graph), "--pool", "smol", "--input", str(tensors), "--out", str(out))
    header, block = unpack(next(iter(server.bodies.values())))
    assert (header, bytes(block)) == (graph.read_bytes(), tensors.read_bytes())
    assert json.loads(output) == {"values": {"echo": len(graph.read_bytes())}}
    assert out.read_bytes() == tensors.read_bytes()
    assert str(out) in errors


def test_run_on_an_unknown_pool_names_the_pools(server, graph):
    """The daemon's refusal arrives as it is."""
    assert "there is no pool 'other'" in call("run", str(graph), "--pool", "other", code=4)[1]


def test_a_file_that_is_no_safetensors_is_refused(server, graph):
    """Before anything is sent."""
    assert "not a safetensors file" in call("run", str(graph), "--pool", "smol", "--input", str(graph), code=2)[1]
    assert server.bodies == {}


def test_out_is_checked_before_anything_runs(server, graph, tmp_path):
    """A folder that is not there is named at once, and nothing is sent."""
    missing = tmp_path / "absent"
    _, errors = call("run", str(graph), "--pool", "smol", "--out", str(missing / "x.safetensors"), code=2)
    assert str(missing) in errors.replace("\n", "")
    assert server.requests == {}


def test_a_dump_has_nothing_for_out(server, tmp_path):
    """`wait --out` says so instead of writing nothing."""
    status = RequestStatus(id="r-abcdefgh2345", kind="dump", pool="smol", state=RequestState.QUEUED, user="alice")
    server.requests[status.id] = status
    assert "is a dump" in call("wait", status.id, "--out", str(tmp_path / "x"), code=2)[1]


def test_a_failed_request_is_the_commands_error(server):
    """`wait` ends with the request's own error and its exit code."""
    status = RequestStatus(id="r-abcdefgh2345", kind="run", pool="smol", state=RequestState.QUEUED, user="alice")
    server.requests[status.id] = status
    server.finish(status.id, RequestState.FAILED, error=Conflict("it was not to be").report())
    assert "it was not to be" in call("wait", status.id, code=5)[1]


def test_cancel_and_requests(server):
    """A cancelled request is listed as such, and waiting for it fails with code 10."""
    status = RequestStatus(id="r-abcdefgh2345", kind="run", pool="smol", state=RequestState.QUEUED, user="alice")
    server.requests[status.id] = status
    assert call("cancel", status.id)[0] == f"{status.id} cancelled\n"
    assert "cancelled" in call("requests")[0]
    assert "was cancelled" in call("wait", status.id, code=10)[1]


def test_ctrl_c_while_waiting_leaves_the_request_and_says_so(server, graph, environment):
    """Exit code 130, no traceback, and how to go on."""
    pool(server)
    server.hold.clear()
    process = subprocess.Popen([*PROGRAM, "run", str(graph), "--pool", "smol"], stderr=subprocess.PIPE, text=True)
    while not server.requests:
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert f"nnsight-hpc wait {next(iter(server.requests))}" in errors
    assert "Traceback" not in errors


# -- datasets ----------------------------------------------------------------------------------------------------


def test_dump_sends_the_corpus_and_waits(server, tmp_path):
    """The spec has what was asked for, the block the documents; a name that exists is a conflict."""
    (tmp_path / "c.txt").write_text("one\ntwo\n")
    options = "--capture model.layers.*.output --name acts --context 64"
    arguments = ["dump", "smol", str(tmp_path / "c.txt"), *options.split()]
    output, errors = call(*arguments)
    header, block = unpack(server.bodies["acts"])
    spec = decode(header, DumpSpec)
    assert (spec.name, spec.captures, spec.context) == ("acts", ("model.layers.*.output",), 64)
    assert bytes(block) == b'{"id":"1","text":"one"}\n{"id":"2","text":"two"}\n'
    assert spec.corpus_fingerprint.startswith("sha256:")
    assert output.splitlines()[0] == f"Dataset acts: {server.datasets['acts']}"
    assert "3/3 documents, 5 tokens/s" in output
    assert "nnsight-hpc fetch acts" in errors
    assert "there is a dataset 'acts' already" in call(*arguments, code=5)[1]


def test_dump_without_waiting_says_the_request(server, tmp_path):
    """--no-wait returns with the id."""
    (tmp_path / "c.txt").write_text("one\n")
    status = answer("dump", "smol", str(tmp_path / "c.txt"), "--capture", "x.output", "--name", "acts", "--no-wait")
    assert status["id"] in server.requests


def test_fetch_prints_where_the_copy_lies(server, dataset, base):
    """And refuses one that exists."""
    server.datasets["acts"] = dataset
    assert call("fetch", "acts", "--to", str(base))[0] == f"{base / 'acts.zarr'}\n"
    assert "exists" in call("fetch", "acts", "--to", str(base), code=5)[1]
    assert "complete" in call("datasets")[0]


def test_datasets_says_what_became_of_an_incomplete_one(server, dataset):
    """Being written, or left as it is by a request that has ended."""
    server.datasets["acts"] = dataset
    for state, words in ((RequestState.RUNNING, "being written: running"), (RequestState.FAILED, "incomplete: failed")):
        server.writing["acts"] = RequestStatus(id="r-abcdefgh2345", kind="dump", pool="smol", state=state, user="alice")
        assert words in call("datasets")[0]


# -- the daemon --------------------------------------------------------------------------------------------------


def test_daemon_start_status_logs_and_stop(base):
    """The real one: started, shown, its log read while it runs and afterwards, stopped."""
    assert "no daemon runs" in call("daemon", "status", code=4)[1]
    assert "no daemon runs" in call("daemon", "logs", code=4)[1]
    started = answer("daemon", "start")
    assert answer("daemon", "status") == started
    assert str(started["pid"]) in call("daemon", "logs")[0]
    assert call("daemon", "stop")[0] == f"Stopped the daemon on {started['host']}, process {started['pid']}.\n"
    assert "stopped" in call("daemon", "logs")[0]
    assert "no daemon runs" in call("daemon", "stop", code=4)[1]


# -- on a terminal -----------------------------------------------------------------------------------------------


def test_on_a_terminal_there_are_bars_and_colours(server, tmp_path):
    """The same commands on a pseudo-terminal: a live line, colours, and plain words in the end."""
    (tmp_path / "c.txt").write_text("one\n")
    command = [*PROGRAM, "dump", "smol", str(tmp_path / "c.txt"), "--capture", "x.output", "--name", "acts"]
    output = on_terminal(command, typed=b"")
    assert "3/3 documents" in output
    assert "dump r-" in output
    assert "\x1b[31m" in on_terminal(command, typed=b"")


@pytest.mark.parametrize("transport", ["paramiko", "openssh"])
def test_on_a_terminal_a_passphrase_is_asked_for(sshd, environment, slurm_server, base, transport):
    """A key that is locked is unlocked by what the person types."""
    keygen(base / "locked", passphrase="secret")
    allowed = sshd.folder / "authorized_keys"
    allowed.write_bytes(allowed.read_bytes() + (base / "locked.pub").read_bytes())
    config.add("uni", sshd.profile(transport, environment=environment, identity_file=str(base / "locked")))
    output = on_terminal([*PROGRAM, "-c", "uni", "status"], typed=b"secret\n", at="assphrase for")
    assert "Daemon of alice" in output


def on_terminal(command: list[str], *, typed: bytes, at: str = "") -> str:
    """What a command shows on a terminal of its own, where `typed` is typed once `at` has been shown."""
    process, terminal = pty.fork()
    if process == 0:
        os.environ["TERM"] = "xterm"
        os.execv(command[0], command)
    shown = b""
    while True:
        try:
            data = os.read(terminal, 4096)
        except OSError:
            break
        if not data:
            break
        shown += data
        if typed and at.encode() in shown:
            os.write(terminal, typed)
            typed = b""
    os.close(terminal)
    os.waitpid(process, 0)
    return shown.decode("utf-8", "replace")
