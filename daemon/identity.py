"""Who sends a request, and whether this daemon serves him at all."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from nnsight_hpc.wire.errors import Denied
from nnsight_hpc.wire.identity import peer, peer_groups, user_name

if TYPE_CHECKING:
    import socket

    from aiohttp import web

    from nnsight_hpc.daemon.admission import Share


class User(NamedTuple):
    name: str
    is_owner: bool


def identify(request: web.Request, share: Share | None) -> User:
    """The user who sent `request`; raises `Denied` for one who is neither the owner nor among those of `share`."""
    if request.transport is None:
        raise Denied("the connection was closed before its user was known")
    connection = request.transport.get_extra_info("socket")
    uid = peer(connection).uid
    if uid != os.getuid() and not _is_let_in(uid, connection, share):
        owner = user_name(os.getuid())
        raise Denied(
            f"this daemon does not serve {user_name(uid)}",
            why=f"it is {owner}'s, who has not let you in",
            next=f"ask {owner} to name you in daemon.toml under [share], or use your own: `nnsight-hpc daemon start`",
        )
    return User(user_name(uid), uid == os.getuid())


def _is_let_in(uid: int, connection: socket.socket, share: Share | None) -> bool:
    return share is not None and (uid in share.uids or (share.gid is not None and share.gid in peer_groups(connection)))
