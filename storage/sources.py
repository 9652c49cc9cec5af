"""Where a dataset lies: in a folder, or on a cluster, from which another package reads it.

``CLUSTER:NAME`` names a dataset on a cluster. What reaches clusters is not known here: it is found by the entry point
``remote`` of the group ``nnsight_hpc.datasets``, a function of the cluster and the name that gives a `Source`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from nnsight_hpc.storage.files import LocalFiles
from nnsight_hpc.wire.errors import NotFound

if TYPE_CHECKING:
    from collections.abc import Callable

    from nnsight_hpc.storage.files import Files

GROUP = "nnsight_hpc.datasets"
_REMOTE = re.compile(r"([A-Za-z0-9][\w.-]*):([A-Za-z0-9][\w.-]*)")


@dataclass(frozen=True)
class Source:
    """A dataset that can be read: `root` is a local folder with its metadata and manifest, `files` has its shards.

    `name` is its folder, or ``CLUSTER:NAME``.
    """

    name: str
    root: Path
    files: Files
    close: Callable[[], None]

    @property
    def here(self) -> bool:
        """Whether all of it lies in the folder."""
        return isinstance(self.files, LocalFiles)


def open_source(path: str | Path | Source) -> Source:
    """The dataset at `path`, a folder or ``CLUSTER:NAME``; a folder that exists is meant where it could be both."""
    if isinstance(path, Source):
        return path
    remote = _REMOTE.fullmatch(str(path))
    if remote is None or Path(path).exists():
        return Source(str(path), Path(path), LocalFiles(Path(path)), lambda: None)
    for entry in entry_points(group=GROUP, name="remote"):
        found: Source = entry.load()(*remote.groups())
        return found
    raise NotFound(
        f"nothing here can read {path} from a cluster", why=f"no entry point {GROUP}", next="install nnsight-hpc anew"
    )
