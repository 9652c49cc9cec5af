"""The first line of a connection, whatever stands before and after it."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnsight_hpc.client.hello import EndedBeforeHello, read_hello
from nnsight_hpc.wire.errors import Denied, Unreachable
from nnsight_hpc.wire.messages import PROTOCOL, Hello, encode

HELLO = Hello(protocol=PROTOCOL, version="1", owner="alice", host="h", pid=1, epoch=1, executor="slurm")
noise = st.lists(st.binary(max_size=60).map(lambda line: line.replace(b"\n", b"") + b"\n"), max_size=5).map(b"".join)


def received(data: bytes) -> socket.socket:
    """A stream on which `data` has come, and then its end."""
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(data)
    return ours


@given(noise, st.binary(max_size=50))
def test_noise_is_passed_over_and_what_follows_stays(before, after):
    """Not a byte behind the hello is taken."""
    with received(before + encode(HELLO) + b"\n" + after) as stream:
        assert read_hello(stream, peer="uni") == HELLO
        assert stream.recv(100) == after


@given(noise)
def test_a_stream_without_hello_ends_with_what_it_said(before):
    """Whatever came instead is kept for the message."""
    with received(before) as stream, pytest.raises(EndedBeforeHello) as caught:
        read_hello(stream, peer="uni")
    assert caught.value.noise == before.decode("utf-8", "replace").strip()


def test_an_error_in_place_of_the_hello_is_raised_with_its_place():
    """The bridge's own error names the cluster."""
    with (
        received(encode(Denied("not yours", where="/home").report()) + b"\n") as stream,
        pytest.raises(Denied) as caught,
    ):
        read_hello(stream, peer="uni")
    assert caught.value.where == "uni: /home"


def test_silence_ends_in_time():
    """Nobody waits for ever for a host that says nothing."""
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(Unreachable, match="no hello in time"):
        read_hello(ours, peer="uni", timeout=0.1)
