"""What a host sees of the machine's file system.

A host sees the machine's files, but has folders of its own where a real host has (/tmp, /run, /dev/shm, …), and its own
accounts and configurations. Users of the cluster must be able to read the interpreter, the virtual environment and the
checkout, wherever these lie: where a folder above them is closed to others (root's home, a private temporary folder), an
open folder is put over it on the host, and only what is needed is brought back into that.
"""

from __future__ import annotations

import os
import stat
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .layout import LAPTOP, SWITCH

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from .layout import Folders, HostSpec

REPOSITORY = Path(__file__).resolve().parents[2]
OWN_FOLDERS = {"/tmp": "1777", "/var/tmp": "1777", "/dev/shm": "1777", "/run": "755", "/var/log": "755"}


@dataclass
class Furnishing:
    """The mounts of a host, made in this order.

    Attributes
    ----------
    empty
        Folders that are covered by a new, empty one with this mode.
    keep
        Paths below them that are brought back.
    folders
        Folders to create.
    binds
        Files and folders (keys) that are replaced by others (values).
    """

    hostname: str
    empty: dict[str, str] = field(default_factory=dict)
    keep: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    binds: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def open_paths(self, paths: Iterable[Path]) -> None:
        """Let everybody on the host read `paths`, whatever lies above them."""
        for path in sorted({part for whole in paths for part in _readable_parts(whole)}):
            covered = [parent for parent in _parents(path) if str(parent) in self.empty or is_closed(parent)]
            if covered:
                self.empty.setdefault(str(covered[0]), "755")
                self._keep(path)

    def _keep(self, path: Path) -> None:
        if not any(path.is_relative_to(kept) for kept in self.keep):
            self.keep.append(str(path))


def furnish(folders: Folders, spec: HostSpec, readable: Iterable[Path]) -> Furnishing:
    """What a host of the cluster sees; its users can read `readable`, this interpreter and this checkout."""
    if spec is SWITCH:
        return Furnishing(spec.name)
    if spec is LAPTOP:
        binds = {f"/etc/{file}": f"{folders.etc}/{file}.laptop" for file in ("passwd", "hosts")}
        return Furnishing(spec.name, empty={"/dev/shm": "1777"}, binds=binds)
    binds = {f"/etc/{file}": f"{folders.etc}/{file}" for file in ("passwd", "group", "shadow", "hosts", "slurm")}
    empty = OWN_FOLDERS | {"/sys/fs/cgroup": "755"}
    furnishing = Furnishing(spec.name, empty=empty, folders=["/run/munge", "/run/sshd"], binds=binds)
    furnishing.open_paths([*program_paths(), *readable])
    return furnishing


def program_paths() -> set[Path]:
    """What must be readable to run this interpreter with this environment and this checkout."""
    prefixes = {Path(sys.base_prefix), Path(sys.prefix), REPOSITORY}
    return prefixes | {prefix.resolve() for prefix in prefixes} | set(_links(Path(sys.executable)))


def is_closed(path: Path) -> bool:
    """Whether `path` is a folder that others cannot pass; a symbolic link is judged where it points to, not here."""
    mode = path.lstat().st_mode
    return stat.S_ISDIR(mode) and not mode & stat.S_IXOTH


def _links(path: Path) -> Iterator[Path]:
    """The files that the name `path` leads to, link by link."""
    while path.is_symlink():
        path = Path(os.path.normpath(path.parent / path.readlink()))
        yield path


def _parents(path: Path) -> list[Path]:
    """The folders above `path`, outermost first."""
    return list(reversed(path.parents))


def _readable_parts(path: Path) -> Iterator[Path]:
    """`path` itself or, where it is closed, what lies in it."""
    if is_closed(path):
        for child in path.iterdir():
            yield from _readable_parts(child)
    else:
        yield path
