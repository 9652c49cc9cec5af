"""A corpus: documents as texts or token ids, from files or from Python, in the one form in which they are sent."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import numpy as np

from nnsight_hpc.storage.corpus_files import rows_of
from nnsight_hpc.wire.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

_SHOWN = 10
LONGEST_LINE = 64 << 20
"""Bytes of a document as it is sent: the daemon reads a corpus line by line."""
TEXT_FIELD = "text"
"""Where a row of a corpus has its text, unless it is said otherwise."""
Token = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]


class Document(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """A text, or token ids; its id is the row's own ``id``, or its number from 1."""

    id: str
    text: str | None = None
    tokens: list[Token] | None = None

    def __post_init__(self) -> None:
        if (self.text is None) == (self.tokens is None):
            raise ValueError("a document has either a text or tokens")


class Corpus(msgspec.Struct, frozen=True):
    """Documents as the JSON lines that are sent, their number, and the SHA-256 of these lines."""

    lines: bytes
    documents: int
    fingerprint: str


def read_corpus(path: Path, *, text_field: str = TEXT_FIELD) -> Corpus:
    """Read and check a corpus on disk.

    Parameters
    ----------
    path
        ``.txt`` with one document a line (empty lines are passed over); ``.jsonl`` with one object a line; ``.parquet``;
        a folder that `datasets.Dataset.save_to_disk` wrote, or an ``.arrow`` file of one; ``.npy`` with token ids
        ``[tokens]`` or ``[documents, tokens]``.
    text_field
        Where a row has its text, or its token ids.

    Raises
    ------
    NotFound
        There is no such file, or the package that reads it is not installed.
    InvalidInput
        It names all bad rows: not UTF-8, without a text in `text_field`, or with an id that an earlier row has.
    """
    return _checked(rows_of(path, text_field), text_field, str(path))


def corpus_of(given: Any, *, text_field: str = TEXT_FIELD) -> Corpus:
    """A corpus that is in memory: texts, lists or arrays of token ids, or rows (dicts) of a dataset.

    Raises `InvalidInput` as `read_corpus`.
    """
    if isinstance(given, str | bytes) or not hasattr(given, "__iter__"):
        raise InvalidInput(
            f"a {type(given).__name__} is no corpus",
            next="give a path, a list of texts, a list of lists of token ids, or an array [documents, tokens]",
        )
    rows = [given] if getattr(given, "ndim", 2) == 1 else given
    return _checked(((f"document {number}", number, row) for number, row in enumerate(rows, 1)), text_field, "")


def pack_corpus(documents: Iterable[Document]) -> Corpus:
    """Documents in the form in which they are sent. Raises `InvalidInput` for one that is too long."""
    encoded = [_line(document) for document in documents]
    lines = b"\n".join(encoded) + b"\n"
    return Corpus(lines, len(encoded), corpus_hash(lines))


def corpus_hash(lines: bytes | memoryview) -> str:
    """SHA-256 of the lines of a corpus."""
    return f"sha256:{hashlib.sha256(lines).hexdigest()}"


def _line(document: Document) -> bytes:
    line = msgspec.json.encode(document)
    if len(line) >= LONGEST_LINE:
        raise InvalidInput(
            f"document {document.id} has {len(line)} bytes as it is sent",
            why=f"it may have {LONGEST_LINE}",
            next="divide it into several documents; token ids may be an array [documents, tokens]",
        )
    return line


def _checked(rows: Iterator[tuple[str, int, Any]], text_field: str, where: str) -> Corpus:
    """The corpus of `rows`: each with how it is called, its number, and its content or the error of reading it."""
    documents: list[Document] = []
    problems: list[str] = []
    seen: dict[str, str] = {}
    for name, number, row in rows:
        try:
            document = _document(row, number, text_field)
        except ValueError as error:
            problems.append(f"{name}: {error}")
            continue
        if (earlier := seen.setdefault(document.id, name)) != name:
            problems.append(f"{name}: the id {document.id!r} is that of {earlier}")
        documents.append(document)
    if problems:
        shown, rest = problems[:_SHOWN], [problem.partition(":")[0] for problem in problems[_SHOWN:]]
        more = [f"and {', '.join(rest)}"] if rest else []
        raise InvalidInput(f"{len(problems)} bad lines in the corpus", where=where, why="\n".join([*shown, *more]))
    if not documents:
        raise InvalidInput("the corpus has no documents", where=where)
    return pack_corpus(documents)


def _document(row: Any, number: int, text_field: str) -> Document:
    """One row's document; raises ValueError that says what is wrong with it."""
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        return _with_content(str(number), row)
    if row.get(text_field) is None or (isinstance(row[text_field], str) and not row[text_field]):
        raise ValueError(f"no text in {text_field!r}; it has {', '.join(map(repr, row)) or 'nothing'}")
    given = row.get("id", number)
    if not isinstance(given, str | int) or isinstance(given, bool):
        raise ValueError(f"its id is neither a string nor an integer: {given!r}")  # noqa: TRY004
    return _with_content(str(given), row[text_field])


def _with_content(name: str, content: Any) -> Document:
    if isinstance(content, str):
        content.encode()  # half of a surrogate pair cannot be sent
        return Document(name, text=content)
    tokens = np.asarray(content)
    if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
        raise ValueError(f"it is neither a text nor a list of token ids: {str(content)[:80]}")
    if tokens.size and (tokens.min() < 0 or tokens.max() >= 2**31):
        raise ValueError("token ids are from 0 to 2**31 - 1")
    return Document(name, tokens=tokens.tolist())
