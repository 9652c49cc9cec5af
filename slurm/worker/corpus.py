"""The corpus of a dump: documents as JSON lines, and the tokens that the model's tokenizer makes of them."""

from __future__ import annotations

import hashlib
import itertools
import json
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from nnsight_hpc.wire.errors import InvalidInput, RequestCancelled

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nnsight_hpc.storage import TokenTable

_AT_ONCE = 1000
"""Documents that go to the tokenizer in one call; between calls a dump can be cancelled."""


class Document(msgspec.Struct, frozen=True):
    """One line of a corpus."""

    id: str
    text: str


def read_corpus(block: bytes | memoryview) -> list[Document]:
    """The documents of JSON lines ``{"id": …, "text": …}``; raises `InvalidInput` for anything else, or for none."""
    try:
        documents = msgspec.json.Decoder(Document).decode_lines(block)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(
            "the corpus cannot be read", why=str(error), next='a line has the form {"id": "a-name", "text": "…"}'
        ) from None
    if not documents:
        raise InvalidInput("the corpus has no documents")
    return documents


def corpus_hash(block: bytes | memoryview) -> str:
    """SHA-256 of the JSON lines, for a request that does not say which corpus it has."""
    return f"sha256:{hashlib.sha256(block).hexdigest()}"


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of what decides how the tokenizer splits text; equal for equal tokenizers, whatever folder they are in."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        text = repr(sorted(tokenizer.get_vocab().items()))
    else:  # what an earlier call left set is not part of the tokenizer
        text = json.dumps(json.loads(backend.to_str()) | {"truncation": None, "padding": None}, sort_keys=True)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def tokenise(
    documents: Sequence[Document], tokenizer: Any, *, context: int, cancelled: Callable[[], bool]
) -> TokenTable:
    """Tokenise every document with the tokenizer's own special tokens, and keep its first `context` tokens.

    Raises `InvalidInput` when there is no tokenizer or not one token, `RequestCancelled` when `cancelled` says so.
    """
    from nnsight_hpc.storage import TokenTable  # noqa: PLC0415 - loads zarr, which a worker without dumps need not

    if tokenizer is None:
        raise InvalidInput("the model has no tokenizer, and a dump begins with text")
    if context < 1:
        raise InvalidInput(f"context is {context}, and must be at least 1")
    rows: list[Sequence[int]] = []
    for start in range(0, len(documents), _AT_ONCE):
        if cancelled():
            raise RequestCancelled("the dump was cancelled while it was tokenised")
        texts = [document.text for document in documents[start : start + _AT_ONCE]]
        rows += tokenizer(texts, truncation=True, max_length=context)["input_ids"]
    offset = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in rows], out=offset[1:])
    if not offset[-1]:
        raise InvalidInput("the corpus has no tokens", why=f"all its {len(documents)} documents are empty")
    input_ids = np.fromiter(itertools.chain.from_iterable(rows), dtype=np.int32, count=int(offset[-1]))
    return TokenTable(input_ids, offset, [document.id for document in documents])
