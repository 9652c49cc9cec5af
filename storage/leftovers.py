"""What programs that were killed have left of datasets, and nobody will go on with."""

from __future__ import annotations

import fcntl
import os
import re
import time
from typing import TYPE_CHECKING

from nnsight_hpc.storage.describe import dataset_names
from nnsight_hpc.storage.schema import METADATA, dataset_folder, read_attributes
from nnsight_hpc.wire.errors import HpcError

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

_HALF_MADE = re.compile(r"\..+\.(zarr|hdf5)\.[0-9a-f]{8}\.(partial|removing)")
_HALF_FETCHED = re.compile(r"[^.].*\.(zarr|hdf5)(\.[0-9a-f]{8})?\.partial")
_QUIET = 3600.0
"""Seconds without a change after which nobody makes or removes a dataset any more."""
_OLD = 7 * 86400.0
"""The same for a dataset that nobody is known to write."""


def left_in(folder: Path, known: Collection[str]) -> list[Path]:
    """In a folder of datasets: half made and half removed ones, and incomplete ones that are not `known` (names)."""
    half = [path for path in _folders(folder, _HALF_MADE) if _rests(path, _QUIET)]
    unknown = [dataset_folder(folder, name) for name in dataset_names(folder) if name not in known]
    return [*half, *(path for path in unknown if _is_orphan(path))]


def half_fetched(folder: Path) -> list[Path]:
    """Copies in a folder that were not brought to their end, and on which no process works."""
    return [path for path in _folders(folder, _HALF_FETCHED) if not _is_locked(path)]


def _folders(folder: Path, name: re.Pattern[str]) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if name.fullmatch(path.name) and path.is_dir())


def _is_orphan(path: Path) -> bool:
    """Whether a dataset is incomplete, and has been so for long; what cannot be read is let be."""
    try:
        return not read_attributes(path).complete and _rests(path, _OLD)
    except HpcError:
        return False


def _rests(path: Path, seconds: float) -> bool:
    """Whether nothing has been made, finished or removed in a dataset for so long."""
    places = [path, *(path / name for name in ("manifest", *METADATA.values())), *path.glob("*/*")]
    return time.time() - max(place.stat().st_mtime for place in places if place.exists()) > seconds


def _is_locked(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
