"""What a program asks of its daemon for a small request: one call, over a connection that stays open."""

from __future__ import annotations

import os
import time

import pytest

from nnsight_hpc.client import kept
from nnsight_hpc.client.backend import RemoteBackend
from nnsight_hpc.client.kept import kept_connection
from nnsight_hpc.client.requests import find
from nnsight_hpc.graph import capture_graph
from nnsight_hpc.wire.errors import NotFound
from nnsight_hpc.wire.messages import Hello, LogLine, ModelIdentity, RequestStatus
from tests.client.program import pool


@pytest.fixture
def ask(server):
    """Run a graph on the pool `smol`, as often as it is called."""
    pool(server)
    graph = capture_graph({"hidden": "model.output"}, ModelIdentity(id="m"))

    def ask() -> None:
        assert "echo" in RemoteBackend(pool="smol").run(graph, {}, None)

    return ask


@pytest.fixture(autouse=True)
def empty():
    """No connection of another test is used."""
    kept._forget()


def asked(server) -> list[str]:
    """The calls about requests: the method, and what of the request."""
    return [f"{call.split()[0]} {call.split('/', 4)[4:]}" for call, _ in server.calls if "/requests/" in call]


def test_a_small_trace_is_one_call_over_a_connection_that_stays(server, ask):
    """Its values come with the news of its end, and the next trace finds the connection open."""
    for _ in range(3):
        ask()
    assert asked(server) == ["POST []"] * 3
    assert len({connection for call, connection in server.calls if "/requests/" in call}) == 1


def test_a_large_result_is_asked_for(server, ask):
    """Where it does not come with the news of the end."""
    server.small_results = False
    ask()
    assert asked(server) == ["POST []", "GET ['result']"]


def test_what_a_request_says_is_read_on_where_the_first_answer_ended(server, ask, capsys, monkeypatch):
    """All lines are printed once, in their order."""
    lines = [LogLine(text=f"line {number}") for number in range(5)]
    monkeypatch.setattr(server, "said", _Same(lines))
    ask()
    assert capsys.readouterr().out.split("\n") == [*(line.text for line in lines), ""]
    assert asked(server)[:2] == ["POST []", "GET ['log']"]


class _Same(dict):
    """The same lines for every request."""

    def __init__(self, lines: list[LogLine]) -> None:
        self._lines = lines

    def get(self, _request: str, _default: object) -> list[LogLine]:
        return self._lines


def test_an_answer_that_says_no_leaves_the_connection_open(server):
    """It was read to its end."""
    with pytest.raises(NotFound), kept_connection("local") as first:
        first.get("/v1/requests/r-abcdefgh2345", RequestStatus)
    with kept_connection("local") as second:
        assert second is first


def test_a_connection_that_was_left_in_the_middle_is_not_used_again(server):
    """As by Ctrl-C: half an answer may be in it."""
    with pytest.raises(KeyboardInterrupt), kept_connection("local") as first:
        first.get("/v1/hello", Hello)
        raise KeyboardInterrupt
    with kept_connection("local") as second:
        assert second is not first


def test_a_connection_that_was_idle_for_long_is_not_used_again(server, monkeypatch):
    """By the clock on the wall, which goes on while a laptop sleeps."""
    with kept_connection("local") as first:
        first.get("/v1/hello", Hello)
    later = time.time() + kept.IDLE
    monkeypatch.setattr(kept.time, "time", lambda: later)
    with kept_connection("local") as second:
        assert second is not first


def test_two_at_once_have_a_connection_each(server):
    """And both are kept."""
    with kept_connection("local") as first, kept_connection("local") as second:
        assert first is not second
    with kept_connection("local") as third, kept_connection("local") as fourth:
        assert {id(third), id(fourth)} == {id(first), id(second)}


def test_a_child_process_does_not_use_its_parents_connections(server):
    """Both would read from one socket."""
    with kept_connection("local") as mine:
        mine.get("/v1/hello", Hello)
    child = os.fork()
    if child == 0:
        with kept_connection("local") as its:
            os._exit(its is mine)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with kept_connection("local") as still:
        assert still is mine


def test_a_daemon_that_was_replaced_is_found_over_a_new_connection(server, ask):
    """Who has kept a connection to the one before notices nothing."""
    ask()
    server.hang_up()
    ask()
    *_, request = server.requests
    assert find(request).status().state.ended
