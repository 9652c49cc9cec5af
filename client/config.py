"""Profiles: which clusters there are, and how to reach each. One TOML file that people may edit.

::

    default = "uni"

    [cluster.uni]
    host = "alice@login.uni.edu"
    transport = "paramiko"                # or "openssh"
    port = 22
    identity_file = "~/.ssh/id_ed25519"
    known_hosts = "~/uni.known_hosts"     # read besides ~/.ssh/known_hosts
    command = "~/venv/bin/nnsight-hpc"    # how a shell on the cluster starts the program
    owner = "ada"                         # whose daemon to use there, when it is shared; else one's own

    [pool.llama]                          # see `definitions`
    cluster = "uni"
    model = "/scratch/models/Llama-3.1-8B"

The profile ``local`` is always there: this machine, without SSH and without Slurm.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from pathlib import Path
from typing import Any, Literal

import msgspec

from nnsight_hpc.client.definitions import CLUSTER, definition
from nnsight_hpc.wire.errors import Conflict, InvalidInput, NotFound
from nnsight_hpc.wire.files import read_if_there, write_atomically
from nnsight_hpc.wire.names import check_name

CONFIG_VARIABLE = "NNSIGHT_HPC_CONFIG"
CLUSTER_VARIABLE = "NNSIGHT_HPC_CLUSTER"
LOCAL = "local"


class Cluster(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True, kw_only=True):
    """How to reach one cluster. `command` is read by the login shell there, so ``~`` and ``&&`` work in it."""

    host: str
    transport: Literal["paramiko", "openssh"] = "paramiko"
    port: int | None = None
    identity_file: str | None = None
    known_hosts: str | None = None
    command: str = "nnsight-hpc"
    owner: str | None = None


class Config(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    default: str | None = None
    cluster: dict[str, Cluster] = {}
    pool: dict[str, dict[str, Any]] = {}

    def chosen(self, name: str | None = None) -> str:
        """The profile to use: `name`, else ``$NNSIGHT_HPC_CLUSTER``, else the file's default, else ``local``."""
        return name or os.environ.get(CLUSTER_VARIABLE) or self.default or LOCAL

    def bound(self, pool: str | None) -> str | None:
        """The cluster that the definition of a pool names, if there is one and it does."""
        return self.pool.get(pool or "", {}).get(CLUSTER)

    def find(self, name: str) -> Cluster | None:
        """The profile of that name, None for ``local``; raises `NotFound` with the names that there are."""
        if name == LOCAL:
            return None
        if name not in self.cluster:
            known = [LOCAL, *sorted(self.cluster)]
            close = difflib.get_close_matches(name, known, n=1)
            raise NotFound(
                f"there is no cluster {name!r}",
                where=str(config_file()),
                why=f"known: {', '.join(known)}",
                next=f"did you mean {close[0]!r}?" if close else f"nnsight-hpc cluster add {name} user@host",
            )
        return self.cluster[name]


def config_file() -> Path:
    """Where the profiles are: ``$NNSIGHT_HPC_CONFIG``, else ``config.toml`` in the user's configuration folder."""
    if given := os.environ.get(CONFIG_VARIABLE):
        return Path(given).expanduser()
    import platformdirs  # noqa: PLC0415 - only needed where the variable does not say it

    return Path(platformdirs.user_config_dir("nnsight-hpc", appauthor=False)) / "config.toml"


def load(path: Path | None = None) -> Config:
    """The profiles in `path` (an absent file has none); raises `InvalidInput` that names file, key and what may stand."""
    path = path or config_file()
    return _parse(read_if_there(path) or b"", path)


def add(name: str, cluster: Cluster, *, default: bool = False) -> Path:
    """Write a new profile into the file, leaving the rest of it (comments too) as it is; raises `Conflict`."""
    path = config_file()
    config, text = load(path), _text(path)
    if name == LOCAL or name in config.cluster:
        raise Conflict(
            f"there is a cluster {name!r} already",
            where=str(path),
            next="choose another name" if name == LOCAL else f"nnsight-hpc cluster remove {name}",
        )
    text = f"{text.rstrip()}\n\n{_section(check_name(name, of='cluster'), cluster)}".lstrip()
    chosen, profiles = name if default else config.default, {**config.cluster, name: cluster}
    wanted = msgspec.structs.replace(config, default=chosen, cluster=profiles)
    return _write(path, _with_default(text, wanted.default), wanted)


def remove(name: str) -> Path:
    """Take a profile out of the file, and the default if it was that; raises `NotFound`."""
    path = config_file()
    config, text = load(path), _text(path)
    if config.find(name) is None:
        raise InvalidInput("the profile 'local' cannot be removed", why="it is this machine")
    default = None if config.default == name else config.default
    profiles = {key: value for key, value in config.cluster.items() if key != name}
    wanted = msgspec.structs.replace(config, default=default, cluster=profiles)
    return _write(path, _with_default(_without_section(text, name), default), wanted)


def _parse(data: bytes, path: Path) -> Config:
    try:
        raw = tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidInput("the configuration is not valid TOML", where=str(path), why=str(error)) from None
    _check_keys(raw, Config, path, "")
    for name, table in _tables(raw, "cluster").items():
        if isinstance(table, dict):
            _check_keys(table, Cluster, path, f"cluster.{name}.")
    for name, table in _tables(raw, "pool").items():
        raw["pool"][name] = definition(name, table, where=f"{path}, [pool.{name}]")
    try:
        config = msgspec.convert(raw, Config)
    except msgspec.ValidationError as error:
        raise InvalidInput("the configuration has a wrong value", where=str(path), why=str(error)) from None
    _check_names(config, path)
    return config


def _tables(raw: dict[str, Any], key: str) -> dict[str, Any]:
    """The tables ``[KEY.…]``; none where it is no table itself, which is told when all of it is converted."""
    found = raw.get(key, {})
    return found if isinstance(found, dict) else {}


def _check_keys(table: dict[str, Any], struct: type[msgspec.Struct], path: Path, prefix: str) -> None:
    allowed = struct.__struct_fields__
    if wrong := [key for key in table if key not in allowed]:
        raise InvalidInput(
            f"the configuration has an unknown key {', '.join(repr(prefix + key) for key in wrong)}",
            where=str(path),
            next=f"allowed here: {', '.join(allowed)}",
        )


def _check_names(config: Config, path: Path) -> None:
    for name, cluster in config.cluster.items():
        if check_name(name, of="cluster") == LOCAL:
            raise InvalidInput("the name 'local' is taken: it is this machine", where=f"{path}, [cluster.local]")
        if not cluster.host or cluster.host.startswith("-") or any(c.isspace() for c in cluster.host):
            raise InvalidInput(f"{cluster.host!r} is not a host", where=f"{path}, [cluster.{name}]", next="user@host")
    if config.default not in (None, LOCAL) and config.default not in config.cluster:
        raise InvalidInput(
            f"the default cluster {config.default!r} is not in the file",
            where=str(path),
            next=f"default = one of {', '.join([LOCAL, *sorted(config.cluster)])}",
        )


def _text(path: Path) -> str:
    return (read_if_there(path) or b"").decode()


def _write(path: Path, text: str, wanted: Config) -> Path:
    """Write `text` if it says what it should; a file in a form that our edit does not understand is left alone."""
    if _parse(text.encode(), path) != wanted:
        raise InvalidInput("the configuration is written in a way that cannot be changed here", next=f"edit {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode())
    return path


def _section(name: str, cluster: Cluster) -> str:
    values = msgspec.to_builtins(cluster)
    return "".join([f"{_header(name)}\n", *(f"{key} = {_value(value)}\n" for key, value in values.items())])


def _header(name: str) -> str:
    return f'[cluster."{name}"]' if "." in name else f"[cluster.{name}]"


def _value(value: str | int) -> str:
    """A TOML value: JSON's strings and integers are TOML's too, but for the one control character that JSON allows."""
    return msgspec.json.encode(value).decode().replace("\x7f", "\\u007f")


def _lines(text: str) -> list[str]:
    """Lines as TOML has them: `str.splitlines` would end one at U+2028 within a string, too."""
    return re.findall(r"[^\n]*\n|[^\n]+", text)


def _with_default(text: str, default: str | None) -> str:
    """`text` with its top-level ``default`` set or taken out; it stands before the first table."""
    lines = _lines(text)
    first = next((i for i, line in enumerate(lines) if line.lstrip().startswith("[")), len(lines))
    top = [line for line in lines[:first] if line.split("=")[0].strip() != "default"]
    own = [] if default is None else [f"default = {_value(default)}\n"]
    gap = ["\n"] if own and not top and lines[first:] else []
    return "".join([*own, *gap, *top, *lines[first:]])


def _without_section(text: str, name: str) -> str:
    kept, inside = [], False
    for line in _lines(text):
        if line.lstrip().startswith("["):
            inside = line.split("#")[0].strip() in (f"[cluster.{name}]", f'[cluster."{name}"]')
        if not inside:
            kept.append(line)
    return "".join(kept)
