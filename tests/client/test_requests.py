"""Requests as objects, against a daemon that speaks the contract (a real one: test_remote.py)."""

from __future__ import annotations

import time

import pytest

from nnsight_hpc.client.requests import RemoteRequest, find
from nnsight_hpc.wire.errors import Conflict, ExecutionFailed, InvalidInput, NotFound, RequestCancelled
from nnsight_hpc.wire.messages import LogLine, RequestStatus
from nnsight_hpc.wire.states import RequestState

ID = "r-abcdefgh2345"


@pytest.fixture
def request_here(server) -> RemoteRequest:
    """A running request that another process has sent."""
    server.requests[ID] = RequestStatus(id=ID, kind="run", pool="smol", state=RequestState.RUNNING, user="alice")
    server.hold.clear()
    return find(ID)


def test_it_is_found_by_its_id(server, request_here):
    """On the cluster that is asked for; an id that is none, or unknown, is an error."""
    assert (request_here.id, request_here.status().state) == (ID, RequestState.RUNNING)
    assert find(ID, "local").id == ID
    with pytest.raises(InvalidInput, match="not the id"):
        find("17")
    with pytest.raises(NotFound):
        find("r-zzzzzzzz2345")


def test_wait_ends_at_its_time_or_with_the_request(server, request_here):
    """A timeout is no error: the status says that the request still runs; without one, it waits for the end."""
    begun = time.monotonic()
    assert request_here.wait(0.3).state == RequestState.RUNNING
    assert 0.3 <= time.monotonic() - begun < 20
    server.hold.set()
    assert request_here.wait().state == RequestState.COMPLETED


def test_a_result_that_is_not_there_says_why(server, request_here):
    """Still running is a `Conflict`, cancelled and failed are what they are."""
    with pytest.raises(Conflict, match="RUNNING"):
        request_here.result(timeout=0.1)
    assert request_here.cancel().state == RequestState.CANCELLED
    with pytest.raises(RequestCancelled):
        request_here.result()
    report = ExecutionFailed("index 9", where="x.py:3: a[9]", exception="IndexError").report()
    server.finish(ID, RequestState.FAILED, error=report)
    with pytest.raises(IndexError, match=r"x\.py:3"):
        request_here.result()


def test_logs_are_what_was_said_so_far_or_until_the_end(server, request_here):
    """Without `follow` it does not wait; with it the lines come until the request has ended."""
    server.said[ID] = [LogLine(text=f"line {number}", source="x.py:3") for number in range(5)]
    texts = [line.text for line in server.said[ID]]
    assert texts == [line.text for line in request_here.logs()]
    assert request_here.status().state == RequestState.RUNNING
    server.hold.set()
    assert texts == [line.text for line in request_here.logs(follow=True)]
    assert request_here.status().state == RequestState.COMPLETED
