"""`nnsight-hpc doctor`: each link that is broken is named, with how to mend it; a whole chain ends with a forward."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from nnsight_hpc.client import config
from tests.client.program import answer, call
from tests.client.sshd import PROGRAM

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.client.sshd import Sshd


@pytest.fixture
def login_node(base: Path, sshd: Sshd, environment: dict[str, str]) -> dict[str, Any]:
    """A profile of this machine by SSH, whose bridge leads to the daemon that `local` has, too."""
    program = base / "bridge"
    settings = shlex.join(f"{key}={value}" for key, value in environment.items())
    program.write_text(f'#!/bin/sh\nexec env {settings} {shlex.quote(str(PROGRAM))} "$@" --executor embedded\n')
    program.chmod(0o755)
    profile: dict[str, Any] = msgspec.to_builtins(sshd.profile("paramiko", command=str(program)))
    return profile


@pytest.fixture
def stopped(base: Path) -> Iterator[None]:
    """Whatever daemon the test has started is stopped in the end, with its workers."""
    yield
    call("daemon", "stop", "--workers")


def profile(given: dict[str, Any]) -> None:
    path = config.config_file()
    path.parent.mkdir(exist_ok=True)
    path.write_text("[cluster.node]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in given.items()))


def found(*arguments: str, code: int = 0) -> dict[str, dict[str, Any]]:
    """What the doctor finds, by link."""
    return {check["link"]: check for check in answer("doctor", *arguments, code=code)}


def test_a_whole_chain_ends_with_one_token_through_the_model(
    base: Path, login_node: dict[str, Any], tiny_llama: Path, stopped: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a worker that serves, every link works, here and through SSH, and the model has run."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    profile(login_node)
    call("up", "tiny", "--model", str(tiny_llama), "--wait")
    here, remote = found(), found("-c", "node")
    behind = ["daemon", "versions", "home", "site file", "batch system", "pool tiny", "forward tiny"]
    assert list(here) == ["configuration", "ssh", *behind]
    assert list(remote) == ["configuration", "ssh", "bridge", *behind]
    assert {link for link, check in here.items() if check["finding"] != "works"} == {"ssh"}
    assert {check["finding"] for check in remote.values()} == {"works"}
    assert remote["forward tiny"]["found"].startswith("one token went through the model")


def test_without_a_pool_there_is_nothing_to_send_and_nothing_is_broken(base: Path, stopped: None) -> None:
    """The last line says how to have a pool; people read one line for each link."""
    lines = call("doctor")[0].splitlines()
    assert lines[-1] == "skipped   forward: there is no pool: nnsight-hpc up NAME --model …"
    assert [line.split()[0] for line in lines[:3]] == ["works", "skipped", "works"]


@pytest.mark.parametrize(
    ("changed", "link", "code", "mend"),
    [
        ({"port": 1}, "ssh", 7, "check that `ssh -p 1 "),
        ({"known_hosts": "/nonexistent"}, "ssh", 6, "compare that fingerprint"),
        ({"identity_file": "OTHER"}, "ssh", 6, "check that `ssh -p "),
        ({"command": "/nonexistent/nnsight-hpc"}, "bridge", 4, "install it there"),
        ({"command": "false"}, "bridge", 7, "look at it with: ssh "),
        ({"transport": "carrier pigeon"}, "configuration", 2, ""),
    ],
)
def test_the_first_broken_link_is_named_and_what_lies_behind_it_is_not_looked_at(
    login_node: dict[str, Any], sshd: Sshd, *, changed: dict[str, Any], link: str, code: int, mend: str
) -> None:
    """It is the last that is told; the exit code is that of its error, which says how to mend it."""
    given = {key: str(sshd.folder / "otherkey") if value == "OTHER" else value for key, value in changed.items()}
    profile(login_node | given)
    checks = found("-c", "node", code=code)
    assert (list(checks)[-1], checks[link]["finding"]) == (link, "broken")
    assert mend in checks[link]["error"].get("next", "")
    assert {check["finding"] for name, check in checks.items() if name != link} <= {"works"}


def test_people_read_where_why_and_what_to_do_below_a_broken_link(login_node: dict[str, Any]) -> None:
    """The parts of the error stand below its line."""
    profile(login_node | {"port": 1})
    shown = call("-c", "node", "doctor", code=7)[0].splitlines()
    assert shown[1].startswith("broken    ssh: ")
    assert [line.split(":")[0].strip() for line in shown[2:] if line.lstrip().startswith(("where", "why", "next"))] == [
        "where",
        "why",
        "next",
    ]
