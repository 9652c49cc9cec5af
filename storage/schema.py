"""What a dataset says about itself: its captures, where they come from, and whether it is complete.

The attributes of the root group are one `DatasetAttributes`; `docs/spec/dataset.md` describes every key.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import ml_dtypes
import msgspec
import numpy as np

from nnsight_hpc.wire.errors import CorruptData, Incompatible, InvalidInput, NotFound
from nnsight_hpc.wire.files import read_if_there

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

FORMAT = "nnsight-hpc-activations"
FORMAT_VERSION = 1
FILE_MODE = 0o666  # the user's umask decides who may read, as for the files that zarr-python writes

BFLOAT16_NAN = 0x7FC0  # quiet NaN: sign 0, exponent all ones, highest fraction bit set

_FLOATS = ("float16", "float32", "float64")
_INTEGERS = ("int8", "int16", "int32", "int64", "uint8")
LOGICAL_DTYPES = ("bfloat16", *_FLOATS, *_INTEGERS)

_DATASET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_CAPTURE_NAME = re.compile(r"(?!__)[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")  # Zarr reserves names that begin with __
_RESERVED = frozenset({"zarr.json", "input_ids", "document", "position"})  # a file of the group, and keys of a batch


class CaptureSpec(msgspec.Struct, frozen=True):
    """One captured value a token: an array ``[tokens, *width_shape]``.

    Parameters
    ----------
    name
        Name of the capture, unique in the dataset: letters, digits, ``.``, ``_`` and ``-`` (a module path fits).
    width_shape
        The dimensions after the token dimension; ``()`` for one number a token.
    dtype
        Logical dtype: ``bfloat16``, ``float16``, ``float32``, ``float64``, ``int8`` to ``int64``, ``uint8``.
    """

    name: str
    width_shape: tuple[int, ...]
    dtype: str


class Provenance(msgspec.Struct, frozen=True, kw_only=True):
    """Where a dataset comes from; strings that are unknown are empty.

    `graph` is the intervention graph as JSON text, `software` maps a distribution's name to its version, `command` is
    what the user typed, `created` is a time in UTC as ISO 8601.
    """

    model: str
    revision: str = ""
    fingerprint: str = ""
    tokenizer_hash: str = ""
    graph: str = ""
    corpus_fingerprint: str = ""
    software: dict[str, str] = {}
    command: str = ""
    created: str = ""


class DatasetAttributes(msgspec.Struct, frozen=True, kw_only=True):
    """The attributes of the root group.

    `rows` counts tokens; rows ``[k * slice_rows, (k + 1) * slice_rows)`` are slice `k`, for every capture alike.
    `completed` is the time at which `complete` became true, empty before.
    """

    format: str
    format_version: int
    complete: bool
    rows: int
    documents: int
    slice_rows: int
    captures: tuple[CaptureSpec, ...]
    provenance: Provenance
    completed: str = ""

    @property
    def slices(self) -> int:
        return -(-self.rows // self.slice_rows)

    def slice_bounds(self, number: int) -> tuple[int, int]:
        """First row of a slice, and the row after its last."""
        start = number * self.slice_rows
        return start, min(start + self.slice_rows, self.rows)


class _RootGroup(msgspec.Struct):
    attributes: msgspec.Raw


def physical_dtype(logical: str) -> np.dtype[np.generic]:
    """The dtype in which Zarr stores a logical dtype: little-endian, and ``uint16`` for the bits of a bfloat16."""
    if logical not in LOGICAL_DTYPES:
        raise InvalidInput(f"dtype {logical!r} cannot be stored", next=f"use one of {', '.join(LOGICAL_DTYPES)}")
    return np.dtype("uint16" if logical == "bfloat16" else logical).newbyteorder("<")


def numpy_dtype(logical: str) -> np.dtype[np.generic]:
    """The dtype in which NumPy computes with a logical dtype: `ml_dtypes.bfloat16` for bfloat16."""
    return np.dtype(ml_dtypes.bfloat16) if logical == "bfloat16" else physical_dtype(logical)


def fill_value(logical: str) -> float:
    """What a missing element reads as in plain Zarr readers: never 0, so that it cannot pass for data."""
    if logical == "bfloat16":
        return BFLOAT16_NAN
    if logical in _FLOATS:
        return float("nan")
    return 255 if logical == "uint8" else -1


def dataset_folder(parent: Path, name: str) -> Path:
    """The folder ``NAME.zarr`` below `parent`, for a name that holds no path.

    Raises
    ------
    InvalidInput
        `name` is empty, longer than 100 characters, or has other characters than letters, digits, ``.``, ``_``, ``-``.
    """
    if not _DATASET_NAME.fullmatch(name) or name.endswith((".zarr", ".partial")):
        raise InvalidInput(
            f"{name!r} is not a name for a dataset",
            why="a name has 1 to 100 letters, digits, '.', '_' or '-', begins with a letter or digit, "
            "and does not end in '.zarr' or '.partial'",
        )
    return parent / f"{name}.zarr"


def check_captures(captures: Sequence[CaptureSpec]) -> None:
    """Refuse captures that cannot be stored; every problem is named in one `InvalidInput`."""
    problems = [problem for capture in captures for problem in _problems(capture)]
    names = [capture.name for capture in captures]
    problems += [f"{name!r} is given {names.count(name)} times" for name in sorted(set(names)) if names.count(name) > 1]
    if not captures:
        problems.append("there are none")
    if problems:
        raise InvalidInput("the captures cannot be stored", why="\n".join(problems))


def _problems(capture: CaptureSpec) -> list[str]:
    problems = []
    if not _CAPTURE_NAME.fullmatch(capture.name) or capture.name in _RESERVED or not capture.name.strip("."):
        problems.append(
            f"{capture.name!r} is not a name: use up to 200 letters, digits, '.', '_' or '-'; some are reserved"
        )
    if capture.dtype not in LOGICAL_DTYPES:
        problems.append(f"{capture.name!r}: dtype {capture.dtype!r} is not one of {', '.join(LOGICAL_DTYPES)}")
    if any(size < 1 for size in capture.width_shape):
        problems.append(f"{capture.name!r}: every dimension of {capture.width_shape} must be at least 1")
    return problems


def read_attributes(path: Path) -> DatasetAttributes:
    """Read the attributes of the dataset in folder `path`.

    Raises
    ------
    NotFound
        There is no dataset at `path`.
    Incompatible
        A later version of this program wrote it, or another program did.
    CorruptData
        Its root ``zarr.json`` cannot be decoded.
    """
    raw = read_if_there(path / "zarr.json") if path.is_dir() else None
    if raw is None:
        raise NotFound("there is no dataset", where=str(path), next="check the path: it ends in .zarr")
    try:
        attributes = msgspec.json.decode(raw, type=_RootGroup).attributes
        _check_version(msgspec.json.decode(attributes, type=dict), path)
        return msgspec.json.decode(attributes, type=DatasetAttributes)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CorruptData(
            "the dataset's attributes cannot be read", where=str(path / "zarr.json"), why=str(error)
        ) from error


def _check_version(attributes: dict[str, object], path: Path) -> None:
    found, version = attributes.get("format"), attributes.get("format_version")
    if found != FORMAT:
        raise Incompatible(f"this is not a dataset of nnsight-hpc (format {found!r})", where=str(path))
    if version != FORMAT_VERSION:
        raise Incompatible(
            f"the dataset has format version {version}, and this program reads version {FORMAT_VERSION}",
            where=str(path),
            next="use the version of nnsight-hpc that wrote it, or a later one",
        )
