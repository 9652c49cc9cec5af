"""Who is at the other end of a Unix socket: the kernel's word (SO_PEERCRED, unix(7)), never a claim."""

from __future__ import annotations

import os
import pwd
import socket
import struct
from typing import TYPE_CHECKING

from nnsight_hpc.wire.errors import Denied

if TYPE_CHECKING:
    from aiohttp import web

_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


def user_name(uid: int) -> str:
    """The name of a user, or the number where the host knows no name for it."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def peer_uid(connection: socket.socket) -> int:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    uid: int = _CREDENTIALS.unpack(credentials)[1]
    return uid


def check_peer(request: web.Request) -> str:
    """The name of the user who sent `request`; raises `Denied` for anybody but the daemon's owner."""
    transport = request.transport
    if transport is None:
        raise Denied("the connection was closed before its user was known")
    uid = peer_uid(transport.get_extra_info("socket"))
    if uid != os.getuid():
        raise Denied(
            f"this daemon serves {user_name(os.getuid())} only",
            why=f"you are {user_name(uid)}",
            next="use your own: `nnsight-hpc daemon start`",
        )
    return user_name(uid)
