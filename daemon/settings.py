"""What a daemon's owner has set in ``HOME/daemon.toml``, where there is one; read when the daemon starts.

::

    [share]               # who may use this daemon, beside its owner
    users = ["bob"]
    group = "lab"         # all its members; its owner has to be one

    [quota]               # for each user
    queued = 1000         # requests in the queue
    running = 4           # replicas on which requests run at once
    result_bytes = 10_000_000_000    # of all results that are kept

    [keep]
    days = 30             # after which a request that has ended is forgotten, with its result, log and story
"""

from __future__ import annotations

import dataclasses
import grp
import os
import pwd
import tomllib
from typing import TYPE_CHECKING, Annotated

import msgspec

from nnsight_hpc.daemon.admission import Share
from nnsight_hpc.wire.errors import InvalidInput
from nnsight_hpc.wire.files import read_if_there

if TYPE_CHECKING:
    from pathlib import Path

    from nnsight_hpc.daemon.config import Config

_Count = Annotated[int, msgspec.Meta(ge=1)]


class _Share(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    users: tuple[str, ...] = ()
    group: str | None = None


class _Quota(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    queued: _Count | None = None
    running: _Count | None = None
    result_bytes: _Count | None = None


class _Keep(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    days: _Count | None = None


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    share: _Share = _Share()
    quota: _Quota = _Quota()
    keep: _Keep = _Keep()

    def applied_to(self, config: Config) -> Config:
        """`config` with what is given of the quotas, and for how long requests are kept."""
        given = {f"{name}_per_user": getattr(self.quota, name) for name in _Quota.__struct_fields__}
        given["keep"] = self.keep.days and self.keep.days * 86400.0
        return dataclasses.replace(config, **{key: value for key, value in given.items() if value is not None})


def read_settings(path: Path) -> Settings:
    """The settings in the file `path`; raises `InvalidInput` that names file and key."""
    try:
        return msgspec.convert(tomllib.loads((read_if_there(path) or b"").decode()), Settings)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise _wrong(path, "", str(error)) from None


def share_of(settings: Settings, path: Path) -> Share | None:
    """Whom the settings in the file `path` let in; None where that is nobody. Raises `InvalidInput`."""
    users, group = settings.share.users, settings.share.group
    if not users and group is None:
        return None
    uids = frozenset(_uid(name, path) for name in users)
    return Share(uids=uids, gid=None if group is None else _own_gid(group, path))


def _uid(name: str, path: Path) -> int:
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        raise _wrong(path, "[share] users", f"this host knows no user {name!r}") from None


def _own_gid(name: str, path: Path) -> int:
    """The number of a group that this process may give its socket to."""
    try:
        gid = grp.getgrnam(name).gr_gid
    except KeyError:
        raise _wrong(path, "[share] group", f"this host knows no group {name!r}") from None
    if os.geteuid() != 0 and gid not in {os.getegid(), *os.getgroups()}:
        raise _wrong(path, "[share] group", f"you are not in the group {name}")
    return gid


def _wrong(path: Path, key: str, why: str) -> InvalidInput:
    where = f"{path}, {key}" if key else str(path)
    return InvalidInput("the daemon's settings cannot be used", where=where, why=why, next="mend the file")
