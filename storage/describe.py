"""What a folder of datasets holds, in the words of the protocol: for the daemon, the bridge, and lists on a laptop."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

from nnsight_hpc.storage.checksums import list_files, resolve_inside
from nnsight_hpc.storage.manifest import read_manifest
from nnsight_hpc.storage.schema import STORES, dataset_folder, is_dataset_name, read_attributes
from nnsight_hpc.wire.errors import HpcError, NotFound
from nnsight_hpc.wire.messages import DatasetFile, DatasetStatus

if TYPE_CHECKING:
    from pathlib import Path


def dataset_names(parent: Path) -> list[str]:
    """The names of the datasets, complete or not, that lie in a folder (which need not exist), in order."""
    folders = [path for store in STORES for path in parent.glob(f"*.{store}") if path.is_dir()]
    return sorted({path.stem for path in folders if is_dataset_name(path.stem)})


def describe(parent: Path, name: str) -> DatasetStatus | None:
    """The dataset `name` in the folder `parent`; None where there is none. What cannot be read is not complete.

    Raises
    ------
    InvalidInput
        `name` is not a name for a dataset.
    """
    folder = dataset_folder(parent, name)
    if not folder.is_dir():
        return None
    try:
        attributes, manifest = read_attributes(folder), read_manifest(folder)
    except HpcError:
        return DatasetStatus(name=name, path=str(folder), complete=False)
    return DatasetStatus(
        name=name,
        path=str(folder),
        complete=attributes.complete,
        bytes=sum(entry.bytes for entry in manifest),
        tokens=attributes.rows,
        documents=attributes.documents,
        captures=tuple(capture.name for capture in attributes.captures),
        created=_moment(attributes.provenance.created) or folder.stat().st_mtime,
    )


def absent(parent: Path, name: str) -> NotFound:
    """What to say of a dataset that is not there."""
    return NotFound(f"there is no dataset {name}", where=str(parent), next="`nnsight-hpc ls` lists them")


def files_to_fetch(parent: Path, name: str) -> list[DatasetFile]:
    """Every file of a complete dataset, with what a copy is checked against; raises as `list_files`."""
    files = list_files(dataset_folder(parent, name))
    return [DatasetFile(path=file.path, size=file.bytes, crc32c=int(file.crc32c, 16)) for file in files]


def file_to_fetch(parent: Path, name: str, path: str) -> Path:
    """One of a dataset's files; raises `NotFound`, and `InvalidInput` for a path that leads out of it."""
    found = resolve_inside(dataset_folder(parent, name), path)
    if not found.is_file():
        raise NotFound(f"dataset {name} has no file {path}")
    return found


def _moment(text: str) -> float:
    """Seconds since the epoch of an ISO 8601 time; 0 where it is none."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return 0.0
