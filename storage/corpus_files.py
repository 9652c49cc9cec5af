"""The rows of corpora on disk, in each form that is known by its name."""

from __future__ import annotations

import json
from importlib import import_module
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np

from nnsight_hpc.wire.errors import InvalidInput, NotFound

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    Row = tuple[str, int, Any]
    """How a row is called in an error, its number from 1, and its content: a text, token ids, an object, or a ValueError."""

_AT_ONCE = 1024
"""Rows of a table that are read at once."""


def rows_of(path: Path, text_field: str) -> Iterator[Row]:
    """The rows of the corpus at `path`; raises `NotFound` and `InvalidInput` for what is none."""
    if not path.exists():
        raise NotFound("there is no such corpus", where=str(path), next=f"give one of {', '.join(_READERS)}")
    if path.is_dir():
        return _saved_dataset(path, text_field)
    if path.suffix not in _READERS:
        raise InvalidInput(
            f"{path.suffix or 'no suffix'} is not a form of corpus",
            where=str(path),
            next=f"{', '.join(_READERS)}, or a folder that datasets.Dataset.save_to_disk wrote",
        )
    return _READERS[path.suffix](path, text_field)


def _text(path: Path, _text_field: str) -> Iterator[Row]:
    for name, number, line in _lines(path):
        try:
            yield name, number, line.decode()
        except UnicodeDecodeError as error:
            yield name, number, ValueError(str(error))


def _json_lines(path: Path, _text_field: str) -> Iterator[Row]:
    for name, number, line in _lines(path):
        try:
            found = json.loads(line.decode())
            yield name, number, found if isinstance(found, dict) else ValueError("not a JSON object")
        except ValueError as error:  # UnicodeDecodeError is one
            yield name, number, ValueError(str(error))


def _lines(path: Path) -> Iterator[tuple[str, int, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if text := line.strip():
                yield f"line {number}", number, text


def _tokens(path: Path, _text_field: str) -> Iterator[Row]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise InvalidInput("this is no array of token ids", where=str(path), why=str(error)) from None
    if array.ndim not in (1, 2) or array.dtype.kind not in "iu":
        raise InvalidInput(
            "this is no array of token ids",
            where=str(path),
            why=f"it is {array.dtype} of shape {list(array.shape)}; token ids are integers [tokens] or [documents, tokens]",
        )
    for number, row in enumerate(np.atleast_2d(array), 1):
        yield f"row {number}", number, row


def _parquet(path: Path, text_field: str) -> Iterator[Row]:
    file = _arrow_module("pyarrow.parquet", path).ParquetFile(path)
    columns = _columns(file.schema_arrow.names, text_field, path)
    return _numbered(batch.to_pylist() for batch in file.iter_batches(_AT_ONCE, columns=columns))


def _arrow(path: Path, text_field: str) -> Iterator[Row]:
    return _numbered(_arrow_tables([path], text_field))


def _saved_dataset(folder: Path, text_field: str) -> Iterator[Row]:
    """What `datasets.Dataset.save_to_disk` wrote: its ``state.json`` names the files of the table in their order."""
    if (folder / "dataset_dict.json").is_file():
        splits = ", ".join(str(one.parent) for one in sorted(folder.glob("*/state.json")))
        raise InvalidInput(
            "this folder holds several splits of a dataset", where=str(folder), next=f"name one: {splits}"
        )
    try:
        files = [folder / one["filename"] for one in json.loads((folder / "state.json").read_bytes())["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInput(
            "this folder is no dataset of Hugging Face",
            where=str(folder),
            why=f"its state.json: {error}",
            next="give a folder that datasets.Dataset.save_to_disk wrote",
        ) from None
    return _numbered(_arrow_tables(files, text_field))


def _arrow_tables(files: Iterable[Path], text_field: str) -> Iterator[list[dict[str, Any]]]:
    """The rows of files of record batches: Arrow's stream format, which `datasets` writes."""
    for path in files:
        pa = _arrow_module("pyarrow", path)
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
            columns = _columns(reader.schema.names, text_field, path)
            for batch in reader:
                yield batch.select(columns).to_pylist()


def _columns(names: list[str], text_field: str, path: Path) -> list[str]:
    if text_field not in names:
        raise InvalidInput(
            f"the corpus has no column {text_field!r}", where=str(path), next=f"it has {', '.join(names)}"
        )
    return [name for name in ("id", text_field) if name in names]


def _numbered(tables: Iterable[list[dict[str, Any]]]) -> Iterator[Row]:
    numbers = count(1)
    for table in tables:
        for row in table:
            number = next(numbers)
            yield f"row {number}", number, row


def _arrow_module(name: str, path: Path) -> Any:
    """pyarrow, or a part of it; raises `NotFound` where it is not installed."""
    try:
        return import_module(name)
    except ImportError:
        raise NotFound(
            f"pyarrow, which reads {path.suffix or 'this'} files, is not installed",
            where=str(path),
            next="pip install pyarrow",
        ) from None


_READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".txt": _text,
    ".jsonl": _json_lines,
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".npy": _tokens,
}
