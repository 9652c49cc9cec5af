"""What a dataset says about itself: its captures, where they come from, and whether it is complete.

The attributes of the dataset are one `DatasetAttributes`; `docs/spec/dataset.md` describes every key. They lie in the
``zarr.json`` of the root group, or in ``dataset.json`` where the arrays are HDF5 files.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal, get_args

import msgspec

from nnsight_hpc.wire.errors import CorruptData, Incompatible, InvalidInput, NotFound
from nnsight_hpc.wire.files import read_if_there

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np

FORMAT = "nnsight-hpc-activations"
FORMAT_VERSION = 1
Store = Literal["zarr", "hdf5"]
"""How the arrays are stored; the ending of the dataset's folder, too."""
STORES: tuple[Store, ...] = get_args(Store)
METADATA: dict[Store, str] = {"zarr": "zarr.json", "hdf5": "dataset.json"}
"""The file below the dataset's root that holds its attributes."""
FILE_MODE = 0o666  # the user's umask decides who may read, as for the files that zarr-python writes

BFLOAT16_NAN = 0x7FC0  # quiet NaN: sign 0, exponent all ones, highest fraction bit set

_FLOATS = ("float16", "float32", "float64")
_INTEGERS = ("int8", "int16", "int32", "int64", "uint8")
LOGICAL_DTYPES = ("bfloat16", *_FLOATS, *_INTEGERS)

_ENDINGS = (*(f".{store}" for store in STORES), ".partial")
_DATASET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_CAPTURE_NAME = re.compile(r"(?!__)[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")  # Zarr reserves names that begin with __
_RESERVED = frozenset({"zarr.json", "input_ids", "document", "position"})  # a file of the group, and keys of a batch


class CaptureSpec(msgspec.Struct, frozen=True):
    """One captured value a token, or a document: an array ``[tokens, *width_shape]`` or ``[documents, *width_shape]``.

    Parameters
    ----------
    name
        Name of the capture, unique in the dataset: letters, digits, ``.``, ``_`` and ``-`` (a module path fits).
    width_shape
        The dimensions after the first; ``()`` for one number a row.
    dtype
        Logical dtype: ``bfloat16``, ``float16``, ``float32``, ``float64``, ``int8`` to ``int64``, ``uint8``.
    rows
        What a row stands for: ``token``, or ``document`` (a mean over its tokens, say).
    """

    name: str
    width_shape: tuple[int, ...]
    dtype: str
    rows: Literal["token", "document"] = "token"


class PartOf(msgspec.Struct, frozen=True, kw_only=True):
    """The dataset of which another one is a part; documents are numbered from 0 in either.

    Parameters
    ----------
    dataset
        Its name.
    manifest
        crc32c of its manifest, 8 hexadecimal digits: it tells two datasets of one name apart.
    tokens, documents
        The rows and the documents of it, [start, stop), that are here; the first and the last document may be cut.
    """

    dataset: str
    manifest: str
    tokens: tuple[int, int]
    documents: tuple[int, int]


class Provenance(msgspec.Struct, frozen=True, kw_only=True):
    """Where a dataset comes from; strings that are unknown are empty.

    `graph` is the intervention graph as JSON text, `software` maps a distribution's name to its version, `command` is
    what the user typed, `created` is a time in UTC as ISO 8601. `tensors` is a hash of the graph's tensor constants, and
    `inputs` says how documents became inputs of the model (``context``, ``stride``, ``packed``, ``batch_tokens``).
    `part_of` says of which dataset this is a part, if it is one; all else is that dataset's.
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
    tensors: str = ""
    inputs: dict[str, int] = {}
    part_of: PartOf | None = None


class DatasetAttributes(msgspec.Struct, frozen=True, kw_only=True):
    """The attributes of the dataset.

    `rows` counts tokens; rows ``[k * slice_rows, (k + 1) * slice_rows)`` are slice `k`, for every capture of tokens
    alike, and with them the documents that begin there.
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
    store: Store = "zarr"

    def rows_of(self, capture: CaptureSpec) -> int:
        """How many rows the array of a capture has."""
        return self.rows if capture.rows == "token" else self.documents

    @property
    def slices(self) -> int:
        return -(-self.rows // self.slice_rows)

    def slice_bounds(self, number: int) -> tuple[int, int]:
        """First row of a slice, and the row after its last."""
        start = number * self.slice_rows
        return start, min(start + self.slice_rows, self.rows)


class _Metadata(msgspec.Struct):
    attributes: msgspec.Raw


def physical_dtype(logical: str) -> np.dtype[np.generic]:
    """The dtype in which Zarr stores a logical dtype: little-endian, and ``uint16`` for the bits of a bfloat16."""
    if logical not in LOGICAL_DTYPES:
        raise InvalidInput(f"dtype {logical!r} cannot be stored", next=f"use one of {', '.join(LOGICAL_DTYPES)}")
    import numpy as np  # noqa: PLC0415  (who lists and hands on files need not load it)

    return np.dtype("uint16" if logical == "bfloat16" else logical).newbyteorder("<")


def numpy_dtype(logical: str) -> np.dtype[np.generic]:
    """The dtype in which NumPy computes with a logical dtype: `ml_dtypes.bfloat16` for bfloat16."""
    if logical != "bfloat16":
        return physical_dtype(logical)
    import ml_dtypes  # noqa: PLC0415  (as above)
    import numpy as np  # noqa: PLC0415

    bfloat16: np.dtype[np.generic] = np.dtype(ml_dtypes.bfloat16)
    return bfloat16


def fill_value(logical: str) -> float:
    """What a missing element reads as in plain Zarr readers: never 0, so that it cannot pass for data."""
    if logical == "bfloat16":
        return BFLOAT16_NAN
    if logical in _FLOATS:
        return float("nan")
    return 255 if logical == "uint8" else -1


def is_dataset_name(name: str) -> bool:
    """Whether a dataset can be called so."""
    return _DATASET_NAME.fullmatch(name) is not None and not name.endswith(_ENDINGS)


def dataset_folder(parent: Path, name: str, store: Store | None = None) -> Path:
    """The folder of the dataset `name` below `parent`: ``NAME.zarr`` or ``NAME.hdf5``.

    Without `store` it is ``NAME.hdf5`` where that exists and ``NAME.zarr`` does not, else ``NAME.zarr``.

    Raises
    ------
    InvalidInput
        `name` is empty, longer than 100 characters, or has other characters than letters, digits, ``.``, ``_``, ``-``.
    """
    if not is_dataset_name(name):
        raise InvalidInput(
            f"{name!r} is not a name for a dataset",
            why="a name has 1 to 100 letters, digits, '.', '_' or '-', begins with a letter or digit, "
            "and does not end in '.zarr', '.hdf5' or '.partial'",
        )
    folders = {one: parent / f"{name}.{one}" for one in STORES}
    if store is not None:
        return folders[store]
    return next((folder for folder in folders.values() if folder.is_dir()), folders["zarr"])


def store_of(path: Path) -> Store:
    """The store that the ending of a dataset's folder names.

    Raises
    ------
    InvalidInput
        The folder has another ending, or what stands before it is not a name.
    """
    for store in STORES:
        if path.name.endswith(ending := f".{store}"):
            dataset_folder(path.parent, path.name.removesuffix(ending), store)
            return store
    raise InvalidInput("the folder of a dataset must end in .zarr or .hdf5", where=str(path))


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
        Its ``zarr.json`` or ``dataset.json`` cannot be decoded.
    """
    for name in METADATA.values() if path.is_dir() else ():
        if (raw := read_if_there(path / name)) is not None:
            return decode_attributes(raw, str(path / name))
    raise NotFound("there is no dataset", where=str(path), next="check the path: it ends in .zarr or .hdf5")


def decode_attributes(raw: bytes, where: str) -> DatasetAttributes:
    """The attributes in the content of a dataset's metadata file, which errors call `where`; see `read_attributes`."""
    try:
        attributes = msgspec.json.decode(raw, type=_Metadata).attributes
        _check_version(msgspec.json.decode(attributes, type=dict), where)
        return msgspec.json.decode(attributes, type=DatasetAttributes)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CorruptData("the dataset's attributes cannot be read", where=where, why=str(error)) from error


def _check_version(attributes: dict[str, object], where: str) -> None:
    found, version = attributes.get("format"), attributes.get("format_version")
    if found != FORMAT:
        raise Incompatible(f"this is not a dataset of nnsight-hpc (format {found!r})", where=where)
    if version != FORMAT_VERSION:
        raise Incompatible(
            f"the dataset has format version {version}, and this program reads version {FORMAT_VERSION}",
            where=where,
            next="use the version of nnsight-hpc that wrote it, or a later one",
        )
