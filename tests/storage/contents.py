"""What makes two datasets the same one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from nnsight_hpc.storage import ManifestEntry, read_attributes, read_manifest
from nnsight_hpc.storage.hdf5 import INDEX
from nnsight_hpc.storage.manifest import MANIFEST

if TYPE_CHECKING:
    from pathlib import Path


def contents(path: Path) -> dict[str, bytes | list[ManifestEntry]]:
    """Every file of a complete dataset by its path below it, without times and writers.

    The index of HDF5 files, which is in no manifest, has the times of its objects within; that it is there must do.
    """
    attributes = read_attributes(path)
    assert attributes.complete
    files: dict[str, bytes | list[ManifestEntry]] = {}
    for file in path.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            for time in (attributes.completed, attributes.provenance.created):
                content = content.replace(time.encode(), b"")
            files[str(file.relative_to(path))] = content
    if INDEX in files:
        files[INDEX] = b""
    return files | {MANIFEST: [msgspec.structs.replace(one, writer="", time="") for one in read_manifest(path)]}
