"""The first line from the other side of a connection: a `Hello`, or the error that kept the bridge from saying it."""

from __future__ import annotations

import socket
import time

import msgspec

from nnsight_hpc.wire.errors import ErrorReport, HpcError, Incompatible, InvalidInput, Unreachable, from_report
from nnsight_hpc.wire.messages import PROTOCOL, Hello, decode

MAX_NOISE = 64 << 10
"""What a login may print before the hello: a banner, a message of the day, a module system's greeting."""


class EndedBeforeHello(Exception):
    """The stream ended; `noise` is what came instead."""

    def __init__(self, noise: str) -> None:
        super().__init__(noise)
        self.noise = noise


def read_hello(stream: socket.socket, *, peer: str, timeout: float = 120.0) -> Hello:
    """The hello of `peer`, leaving what follows it in the stream.

    Raises `EndedBeforeHello`, `Unreachable` (silence, or noise without end), `Incompatible` (another protocol), or the
    error that the bridge reports.
    """
    until, noise = time.monotonic() + timeout, bytearray()
    while len(noise) < MAX_NOISE:
        line = _line(stream, until, noise, peer)
        if (hello := _parse(line)) is not None:
            return _checked(hello, peer)
        noise += line
    raise Unreachable(f"{peer} talks, but says no hello", why=_text(noise)[:500], next=_SILENCE_ADVICE)


_SILENCE_ADVICE = "have the shell's start-up files on the cluster print nothing for commands that ssh runs"


def _line(stream: socket.socket, until: float, noise: bytearray, peer: str) -> bytes:
    """Bytes up to and with the next newline; the last one may have none when the stream ends."""
    line = bytearray()
    while len(line) < MAX_NOISE:
        stream.settimeout(max(until - time.monotonic(), 0.01))
        try:
            seen = stream.recv(4096, socket.MSG_PEEK)
            taken = stream.recv(seen.find(b"\n") + 1 or len(seen)) if seen else b""
        except TimeoutError:
            raise Unreachable(f"{peer} said no hello in time", why=_text(noise + line), next=_SILENCE_ADVICE) from None
        except OSError:
            taken = b""
        if not taken:
            raise EndedBeforeHello(_text(noise + line))
        line += taken
        if line.endswith(b"\n"):
            break
    return bytes(line)


def _parse(line: bytes) -> Hello | HpcError | None:
    """What a line says, where noise without a newline may stand before it."""
    candidate = line[line.find(b"{") :] if b"{" in line else b""
    try:
        keys = decode(candidate, dict[str, msgspec.Raw])
        if "protocol" in keys:
            protocol = bytes(keys["protocol"]).decode()
            return decode(candidate, Hello) if protocol == str(PROTOCOL) else _other(protocol)
        if {"kind", "what"} <= keys.keys():
            return from_report(decode(candidate, ErrorReport))
    except InvalidInput:
        pass
    return None


def _other(protocol: str) -> Incompatible:
    return Incompatible(
        f"the other side speaks protocol {protocol}, this one speaks {PROTOCOL}",
        next="install the same version of nnsight-hpc on both sides, then `nnsight-hpc daemon stop` on the older one",
    )


def _checked(hello: Hello | HpcError, peer: str) -> Hello:
    if isinstance(hello, HpcError):
        hello.where = f"{peer}: {hello.where}" if hello.where else peer
        raise hello
    return hello


def _text(data: bytes | bytearray) -> str:
    return data.decode("utf-8", "replace").strip()
