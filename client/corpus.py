"""Reading a corpus: ``.txt`` with one document a line, or ``.jsonl`` with one object a line."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import msgspec

from nnsight_hpc.wire.errors import InvalidInput, NotFound

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

_SHOWN = 10


class Document(msgspec.Struct, frozen=True):
    """One text; its id is the line's own ``id``, or the line's number from 1."""

    id: str
    text: str


class Corpus(msgspec.Struct, frozen=True):
    """Documents as the JSON lines that are sent, their number, and the SHA-256 of these lines."""

    lines: bytes
    documents: int
    fingerprint: str


def read_corpus(path: Path, *, text_field: str = "text") -> Corpus:
    """Read and check a corpus file; empty lines are passed over.

    Raises `NotFound` when there is no such file, and `InvalidInput` that names the bad lines: not UTF-8, not an object,
    without a text in `text_field`, or with an id that an earlier line has.
    """
    if not path.is_file():
        raise NotFound("there is no such corpus", where=str(path), next="give a .txt or .jsonl file")
    if path.suffix not in (".txt", ".jsonl"):
        raise InvalidInput(
            f"{path.suffix or 'no suffix'} is not a form of corpus", where=str(path), next=".txt or .jsonl"
        )
    documents, problems = _read(path, text_field)
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise InvalidInput(
            f"{len(problems)} bad lines in the corpus", where=str(path), why="\n".join([*problems[:_SHOWN], *more])
        )
    if not documents:
        raise InvalidInput("the corpus has no documents", where=str(path))
    return pack_corpus(documents)


def pack_corpus(documents: Iterable[Document]) -> Corpus:
    """Documents in the form in which they are sent."""
    encoded = [msgspec.json.encode(document) for document in documents]
    lines = b"\n".join(encoded) + b"\n"
    return Corpus(lines, len(encoded), f"sha256:{hashlib.sha256(lines).hexdigest()}")


def _read(path: Path, text_field: str) -> tuple[list[Document], list[str]]:
    documents: list[Document] = []
    problems: list[str] = []
    seen: dict[str, int] = {}
    for number, line in _numbered(path):
        try:
            document = _document(line, number, text_field if path.suffix == ".jsonl" else None)
        except ValueError as error:
            problems.append(f"line {number}: {error}")
            continue
        if (earlier := seen.setdefault(document.id, number)) != number:
            problems.append(f"line {number}: the id {document.id!r} is that of line {earlier}")
        documents.append(document)
    return documents, problems


def _numbered(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if text := line.strip():
                yield number, text


def _document(line: bytes, number: int, text_field: str | None) -> Document:
    """One line's document; raises ValueError that says what is wrong with it."""
    text = line.decode()  # UnicodeDecodeError is a ValueError
    if text_field is None:
        return Document(str(number), text)
    values: Any = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")  # noqa: TRY004 - the caller's one way to hear of a bad line
    if not isinstance(values.get(text_field), str) or not values[text_field]:
        raise ValueError(f"no text in {text_field!r}; it has {', '.join(map(repr, values)) or 'nothing'}")
    given = values.get("id", number)
    if not isinstance(given, str | int) or isinstance(given, bool):
        raise ValueError(f"its id is neither a string nor an integer: {given!r}")  # noqa: TRY004
    return Document(str(given), values[text_field])
