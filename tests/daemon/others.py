"""Other users of a daemon: connections that the kernel says are theirs. Only root can be them."""

from __future__ import annotations

import os
import pwd
import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nnsight_hpc.wire.http import HttpClient

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def being(user: str, *groups: int) -> Iterator[None]:
    """Let this process be the user of that name, for as short as can be: SO_PEERCRED tells who has connected."""
    account = pwd.getpwnam(user)
    with being_number(account.pw_uid, account.pw_gid, *groups):
        yield


@contextmanager
def being_number(uid: int, gid: int, *groups: int) -> Iterator[None]:
    """As `being`, also where nobody has that number."""
    mine = os.getgroups()
    try:
        os.setgroups([gid, *groups])
        os.setegid(gid)
        os.seteuid(uid)
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(mine)


def people_as(path: Path, user: str, *groups: int) -> HttpClient:
    """A client of the daemon that listens at `path`, as that user has it who is in these further groups."""

    def connect() -> socket.socket:
        stream = socket.socket(socket.AF_UNIX)
        try:
            with being(user, *groups):
                stream.connect(str(path))
        except BaseException:
            stream.close()
            raise
        return stream

    return HttpClient(connect, peer=f"the daemon, for {user}")
