"""Activation datasets on disk: written by workers slice by slice, checked, read back and fed to training.

`docs/spec/dataset.md` specifies the format. The names below are imported when they are first used (PEP 562): the daemon
lists and checks files without loading zarr, and nothing here loads torch but `ActivationDataset.to_torch`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nnsight_hpc.storage.checksums import FileSum, list_files, resolve_inside, verify_files
    from nnsight_hpc.storage.convert import convert_dataset
    from nnsight_hpc.storage.damage import Damage, find_damage, repair
    from nnsight_hpc.storage.manifest import ManifestEntry, read_manifest
    from nnsight_hpc.storage.reader import ActivationDataset
    from nnsight_hpc.storage.schema import CaptureSpec, DatasetAttributes, Provenance, dataset_folder, read_attributes
    from nnsight_hpc.storage.slices import SliceRange
    from nnsight_hpc.storage.tokens import TokenTable
    from nnsight_hpc.storage.writer import DatasetWriter

_LAZY = {
    "ActivationDataset": "reader",
    "CaptureSpec": "schema",
    "Damage": "damage",
    "DatasetAttributes": "schema",
    "DatasetWriter": "writer",
    "FileSum": "checksums",
    "ManifestEntry": "manifest",
    "Provenance": "schema",
    "SliceRange": "slices",
    "TokenTable": "tokens",
    "convert_dataset": "convert",
    "dataset_folder": "schema",
    "find_damage": "damage",
    "list_files": "checksums",
    "read_attributes": "schema",
    "read_manifest": "manifest",
    "repair": "damage",
    "resolve_inside": "checksums",
    "verify_files": "checksums",
}

__all__ = [
    "ActivationDataset",
    "CaptureSpec",
    "Damage",
    "DatasetAttributes",
    "DatasetWriter",
    "FileSum",
    "ManifestEntry",
    "Provenance",
    "SliceRange",
    "TokenTable",
    "convert_dataset",
    "dataset_folder",
    "find_damage",
    "list_files",
    "read_attributes",
    "read_manifest",
    "repair",
    "resolve_inside",
    "verify_files",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
