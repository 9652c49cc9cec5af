"""Who is at the other end of a Unix socket: the kernel's word (SO_PEERCRED, unix(7)), never a claim."""

from __future__ import annotations

import pwd
import socket
import struct
from functools import cache
from typing import NamedTuple

_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid
_PEER_GROUPS = 59  # SO_PEERGROUPS, <asm-generic/socket.h>, which Python does not name
_MOST_BYTES = 1024  # what `getsockopt` of Python takes: 256 groups


class Peer(NamedTuple):
    """The process that made the other end, its user and his main group then, whatever became of them since."""

    pid: int
    uid: int
    gid: int


@cache
def user_name(uid: int) -> str:
    """The name of a user, or the number where the host knows no name for it."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def peer(connection: socket.socket) -> Peer:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return Peer(*_CREDENTIALS.unpack(credentials))


def peer_groups(connection: socket.socket) -> frozenset[int]:
    """All groups of the process at the other end; raises OSError when these are more than 256."""
    data = connection.getsockopt(socket.SOL_SOCKET, _PEER_GROUPS, _MOST_BYTES)
    return frozenset({peer(connection).gid, *struct.unpack(f"{len(data) // 4}I", data)})
