"""The daemon of somebody else on this host, which its owner shares."""

from __future__ import annotations

import pwd
import socket
from typing import TYPE_CHECKING

from nnsight_hpc.client.launch import open_socket
from nnsight_hpc.wire.errors import Conflict, Denied, InvalidInput, NotFound
from nnsight_hpc.wire.identity import peer, user_name
from nnsight_hpc.wire.places import shared_folder

if TYPE_CHECKING:
    from pathlib import Path


def uid_of(owner: str) -> int:
    """The uid of the user `owner`; raises `InvalidInput` where this host knows none of that name."""
    try:
        return pwd.getpwnam(owner).pw_uid
    except KeyError:
        raise InvalidInput(
            f"there is no user {owner!r} on {socket.gethostname()}",
            next="`owner` of a cluster is the login name of the person whose daemon you use",
        ) from None


def shared_socket(executor: str, uid: int) -> Path:
    """The socket of the one daemon that the user `uid` shares on this host and that answers.

    Raises `NotFound` where there is none, `Denied` where this user may not use it, `Conflict` where there are several.
    """
    try:
        paths = sorted(shared_folder(uid).glob(f"{executor}-*.sock"))
        found = [path for path in paths if _answers(path, uid)]
    except PermissionError as error:
        raise _not_let_in(uid, str(error.filename or shared_folder(uid))) from None
    if not found:
        raise NotFound(
            f"{user_name(uid)} shares no daemon on {socket.gethostname()}",
            where=str(shared_folder(uid)),
            next=f"ask {user_name(uid)} to start it with [share] in daemon.toml, or on which login node it runs",
        )
    if len(found) > 1:
        raise Conflict(
            f"{user_name(uid)} shares more than one daemon on {socket.gethostname()}",
            where=", ".join(map(str, found)),
            next=f"ask {user_name(uid)} to stop all but one",
        )
    return found[0]


def open_of(path: Path, uid: int) -> socket.socket:
    """A connection to a Unix socket on which the user `uid` listens; raises OSError, and `Denied` where it is another."""
    stream = open_socket(path)
    if peer(stream).uid != uid:
        stream.close()
        raise Denied(f"it is not {user_name(uid)} who listens there", where=str(path))
    return stream


def _answers(path: Path, uid: int) -> bool:
    try:
        open_of(path, uid).close()
    except PermissionError:
        raise
    except OSError:  # of a daemon that was killed
        return False
    return True


def _not_let_in(uid: int, where: str) -> Denied:
    return Denied(
        f"{user_name(uid)} has not let you in",
        where=where,
        next=f"ask {user_name(uid)} to name you in daemon.toml under [share]; you may have to log in again after it",
    )
