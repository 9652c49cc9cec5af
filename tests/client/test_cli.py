"""The commands, against a daemon that speaks the contract: what they send, print, and end with."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import msgspec
import pytest

from nnsight_hpc.client import config
from nnsight_hpc.client.cli import COMMANDS, program
from nnsight_hpc.wire.errors import ErrorReport
from nnsight_hpc.wire.frames import unpack
from nnsight_hpc.wire.messages import DumpSpec, RequestStatus, decode
from nnsight_hpc.wire.states import RequestState
from tests.client.program import PROGRAM, answer, call, on_terminal
from tests.client.sshd import PROGRAM as INSTALLED
from tests.client.sshd import keygen

HEAVY = {"torch", "numpy", "paramiko", "aiohttp", "zarr", "rich", "cryptography", "transformers"}


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


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["status"], ["up", "--help"], ["status", "--watch"], ["cluster", "list"]]
)
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
        (["plan", "smol"], 2, "--model"),
        (["up", "smol", "--model", "m", "--replicas", "3:1"], 2, "replicas cannot be '3:1'"),
        (["up", "smol", "--model", "m", "--idle", "soon"], 2, "idle cannot be 'soon'"),
        (["down"], 2, "--all"),
        (["down", "smol", "--all"], 2, "--all"),
        (["logs", "r-abcdefgh2345", "--rank", "1"], 2, "has no --rank"),
        (["run", __file__, "--needs", "long"], 2, "needs cannot be 'long'"),
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
    _, errors = call("queue", code=1)
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


def test_ls_lists_what_is_there_and_here(server, dataset, base):
    """With size, tokens, captures and age; for programs with all captures."""
    server.datasets["there"] = dataset
    call("fetch", "there", "--to", str(base))
    listed = answer("ls", "--in", str(base))
    assert [one["name"] for one in listed["there"]] == ["there"]
    [here] = listed["here"]
    assert (here["path"], here["complete"], here["tokens"]) == (str(base / "there.zarr"), True, 2000)
    assert here["captures"] == ["model.layers.1.output", "model.layers.2.output"]
    shown = call("ls", "--in", str(base))[0]
    for words in ("THERE", "HERE", "complete", "2,000", "model.layers.1.output +1", "KiB"):
        assert words in shown
    server.datasets.clear()
    assert call("ls", "--in", str(base / "home"))[0] == "No datasets.\n"


def test_rm_asks_and_removes(server, dataset):
    """Several at once, all of which have to be there; what is not confirmed stays."""
    server.datasets |= {"one": dataset, "two": dataset}
    assert "there is no dataset" in call("rm", "one", "three", "--yes", code=4)[1]
    assert "Remove this?" in call("rm", "one", code=130)[1]
    assert set(server.datasets) == {"one", "two"}
    assert call("rm", "one", "two", "--yes")[0] == f"Removed {dataset}.\nRemoved {dataset}.\n"
    assert server.datasets == {}


def test_ls_says_what_became_of_an_incomplete_one(server, dataset):
    """Being written, or left as it is by a request that has ended."""
    server.datasets["acts"] = dataset
    for state, words in ((RequestState.RUNNING, "being written: running"), (RequestState.FAILED, "incomplete: failed")):
        server.writing["acts"] = RequestStatus(id="r-abcdefgh2345", kind="dump", pool="smol", state=state, user="alice")
        assert words in call("ls")[0]


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
