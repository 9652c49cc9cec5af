"""`dashboard`: who gets through its port, what is answered there, and what is left when it ends."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path

import psutil
import pytest

from nnsight_hpc.client import config
from nnsight_hpc.client.dashboard import Feed
from nnsight_hpc.wire.dashboard import PAGE
from nnsight_hpc.wire.names import new_request_id
from tests.client.dashboard import DashboardProcess, daemon_of_ones_own, folder_of, places_of
from tests.client.program import PROGRAM
from tests.daemon.process import send, wait_for


@pytest.fixture(scope="module")
def daemon():
    with daemon_of_ones_own() as daemon:
        daemon.up()
        yield daemon
        daemon.stop()


def state(dashboard, seen: str = "") -> dict:
    status, _, body = dashboard.ask(f"state?seen={seen}")
    assert status == HTTPStatus.OK, body
    return json.loads(body)


def test_with_the_secret_the_page_is_given_and_may_do_nothing_else(dashboard):
    """Its files, with a policy that lets it ask here and nowhere else; what it shows comes as JSON."""
    for name, kind in {"": "text/html", **PAGE}.items():
        status, headers, body = dashboard.ask(name)
        assert (status, headers["Content-Type"]) == (HTTPStatus.OK, f"{kind}; charset=utf-8")
        assert headers["Content-Security-Policy"].startswith(
            "default-src 'none'; script-src 'self'; style-src 'self'; "
        )
        assert (headers["Referrer-Policy"], headers["Cache-Control"]) == ("no-referrer", "no-store")
        assert b"://" not in body.replace(b"http://www.w3.org/2000/svg", b"")  # nothing comes from elsewhere
    assert state(dashboard)["pools"][0]["name"] == "smol"


def test_under_another_name_of_this_machine_it_is_the_same(dashboard):
    """As after `ssh -L`, which has another port, too."""
    for host in ("localhost", "localhost:1234", f"127.0.0.1:{dashboard.port}"):
        assert dashboard.ask("state", Host=host, Origin=f"http://{host}")[0] == HTTPStatus.OK


@pytest.mark.parametrize(
    "path", ["/", "/state", "/x/state", "/{secret}x/state", "//{secret}/state", "/%ff{secret}/state"]
)
def test_without_the_secret_nothing_is_given(dashboard, path):
    """Whatever is asked for, the answer is the same."""
    status, _, body = dashboard.ask(path.format(secret=dashboard.path.strip("/")))
    assert (status, body) == (HTTPStatus.FORBIDDEN, b"nnsight-hpc dashboard prints the address of this page.")


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "127.0.0.1.evil.example:80"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "https://127.0.0.1"},
    ],
    ids=str,
)
def test_pages_of_others_are_refused_though_they_knew_the_secret(dashboard, headers):
    """A name that somebody has pointed here (DNS rebinding), and another page's script."""
    for path in ("", "state"):
        assert dashboard.ask(path, **headers)[0] == HTTPStatus.FORBIDDEN


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"])
def test_nothing_can_be_done_but_to_look(dashboard, method):
    """With the secret, too."""
    for path in ("", "state", "dashboard.js"):
        assert dashboard.ask(path, method)[0] == HTTPStatus.METHOD_NOT_ALLOWED


@pytest.mark.parametrize("path", ["v1/hello", "v1/stop", "state/x", "../v1/hello", "..%2fv1%2fhello", "__init__.py"])
def test_the_daemon_cannot_be_reached_through_it(dashboard, path):
    """Only what the page needs is there."""
    assert dashboard.ask(path)[0] in (HTTPStatus.NOT_FOUND, HTTPStatus.FORBIDDEN)


def test_pages_share_one_question_to_the_daemon(daemon):
    """Three pages wait, something happens, all are told; and nothing is asked while nobody waits."""
    client = daemon.people()
    feed, calls, call = Feed(client), [], client.call

    def counting(method: str, path: str, *rest, **more):
        calls.append(path)
        return call(method, path, *rest, **more)

    client.call = counting
    feed.load()
    seen = json.loads(asyncio.run(feed.newer("")))["version"]
    calls.clear()

    async def wait() -> list[bytes]:
        waiting = [asyncio.ensure_future(feed.newer(seen)) for _ in range(3)]
        await asyncio.to_thread(wait_for, lambda: calls)
        await asyncio.to_thread(send, daemon.people(), new_request_id())
        return await asyncio.gather(*waiting)

    first, *others = asyncio.run(wait())
    assert (len(calls), others) == (1, [first, first])
    assert json.loads(first)["queued"] == 1


def test_a_daemon_that_goes_is_told_and_the_next_one_found(daemon, dashboard):
    """As an error report with the status 503; the daemon that comes is asked again."""
    seen = state(dashboard)["version"]
    daemon.kill()
    status, _, body = dashboard.ask(f"state?seen={seen}")
    while status == HTTPStatus.OK:  # what had come before it went
        status, _, body = dashboard.ask(f"state?seen={json.loads(body)['version']}")
    assert (status, json.loads(body)["kind"]) == (HTTPStatus.SERVICE_UNAVAILABLE, "Unreachable")
    daemon.start()
    wait_for(lambda: dashboard.ask("state")[0] == HTTPStatus.OK)
    assert state(dashboard)["daemon"]["pid"] == daemon.process.pid


def test_it_goes_through_ssh_and_a_lost_connection_is_replaced(daemon, sshd, monkeypatch):
    """The sessions of sshd are killed: what happens in the daemon later is told all the same."""
    environment = places_of(daemon)
    (daemon.places.home.parent / "slurm").symlink_to(daemon.places.home)  # what a bridge looks for
    monkeypatch.setenv("NNSIGHT_HPC_CONFIG", environment["NNSIGHT_HPC_CONFIG"])
    here = {name: environment[name] for name in ("NNSIGHT_HPC_HOME", "XDG_RUNTIME_DIR")}
    config.add("uni", sshd.profile("paramiko", environment=here))
    with DashboardProcess("--no-browser", environment=environment, cluster="uni") as dashboard:
        seen = state(dashboard)["version"]
        sessions = psutil.Process(sshd.pid).children()
        assert sessions
        for session in sessions:
            with suppress(psutil.NoSuchProcess):  # another test's, which was about to end
                session.kill()
        send(daemon.people(), request := new_request_id())
        wait_for(lambda: request in _own(dashboard, seen))
        assert dashboard.interrupt()[0] == 0


def _own(dashboard, seen: str) -> list[str]:
    """One's requests, once the state is another than was seen; none while it is not known."""
    status, _, body = dashboard.ask(f"state?seen={seen}")
    return [one["id"] for one in json.loads(body)["own"]] if status == HTTPStatus.OK else []


def test_ctrl_c_ends_it_and_nothing_is_left(daemon, tmp_path):
    """Also while a page waits; the browser was given a file with the address, which others cannot read."""
    environment, browser = places_of(daemon), tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/given.part\nmv {tmp_path}/given.part {tmp_path}/given\n')
    browser.chmod(0o755)
    environment |= {"BROWSER": f"{browser} %s", "DISPLAY": ":0"}
    with DashboardProcess(environment=environment) as dashboard:
        way = Path(wait_for(lambda: (tmp_path / "given").exists() and (tmp_path / "given").read_text()).strip()[7:])
        assert dashboard.url in way.read_text()
        assert way.stat().st_mode & 0o777 == 0o600
        seen, waiting = state(dashboard)["version"], socket.create_connection(("127.0.0.1", dashboard.port))
        waiting.sendall(f"GET {dashboard.path}state?seen={seen} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        children = psutil.Process(dashboard.process.pid).children(recursive=True)
        assert dashboard.interrupt() == (0, "", "Ctrl-C ends it.\n")
        waiting.close()
    wait_for(lambda: not [child for child in children if child.is_running()])
    assert not way.exists()
    assert [one.name for one in (folder_of(daemon) / "run" / "nnsight-hpc").iterdir() if "dashboard" in one.name] == []
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", dashboard.port))


def test_as_json_the_address_is_a_field(daemon):
    """What is printed before it ends is one document."""
    command = [*PROGRAM, "-c", "local", "--json", "dashboard", "--no-browser"]
    with subprocess.Popen(command, env=places_of(daemon), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        printed = b"".join(iter(process.stdout.readline, b"}\n"))
        process.send_signal(signal.SIGINT)
    assert json.loads(printed + b"}")["url"].startswith("http://127.0.0.1:")
    assert process.returncode == 0


def test_a_port_that_is_taken_is_said_in_words(daemon, dashboard):
    """And where none was asked for a free one is found."""
    command = [*PROGRAM, "-c", "local", "dashboard", "--no-browser", "--port", str(dashboard.port)]
    ended = subprocess.run(command, env=places_of(daemon), capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (5, "")
    assert f"nothing can listen on port {dashboard.port} of this machine" in ended.stderr


def test_without_a_daemon_no_port_is_opened(base):
    """It is said at once, and none is started."""
    command = [*PROGRAM, "dashboard", "--no-browser"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (4, "")
    assert "nnsight-hpc daemon start" in ended.stderr
