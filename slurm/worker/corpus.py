"""The corpus of a dump as rows of tokens, and as what the model is given: whole documents, windows of them, or packed ones."""

from __future__ import annotations

import hashlib
import itertools
import json
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np

from nnsight_hpc.storage import TokenTable
from nnsight_hpc.storage.corpus import Document
from nnsight_hpc.wire.errors import InvalidInput, RequestCancelled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy.typing as npt

    from nnsight_hpc.wire.messages import DumpSpec

    Tokens = npt.NDArray[np.int32]

_AT_ONCE = 1000
"""Documents that go to the tokenizer in one call; between calls a dump can be cancelled."""


class Inputs(NamedTuple):
    """The rows of a dataset, and the inputs of the model that give them.

    Input `i` is the tokens of rows ``begin[i]`` to ``offset[i + 1] - 1``; of these the rows from ``offset[i]`` on are its
    own, and those before are context that another input has written.
    """

    tokens: TokenTable
    begin: npt.NDArray[np.int64]
    offset: npt.NDArray[np.int64]

    def length(self, index: int) -> int:
        """Tokens that the model is given."""
        return int(self.offset[index + 1] - self.begin[index])

    def ids(self, index: int) -> Tokens:
        """The tokens that the model is given."""
        return self.tokens.input_ids[self.begin[index] : self.offset[index + 1]]

    @property
    def are_documents(self) -> bool:
        """Whether each document is one input."""
        return np.array_equal(self.offset, self.tokens.offset)


def read_documents(block: bytes | memoryview) -> list[Document]:
    """The documents of a corpus's lines; raises `InvalidInput` for anything else, or for none."""
    try:
        documents = msgspec.json.Decoder(Document).decode_lines(block)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(
            "the corpus cannot be read", why=str(error), next='a line has the form {"id": "a-name", "text": "…"}'
        ) from None
    if not documents:
        raise InvalidInput("the corpus has no documents")
    return documents


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of what decides how the tokenizer splits text; equal for equal tokenizers, whatever folder they are in."""
    if tokenizer is None:
        return ""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        text = repr(sorted(tokenizer.get_vocab().items()))
    else:  # what an earlier call left set is not part of the tokenizer
        text = json.dumps(json.loads(backend.to_str()) | {"truncation": None, "padding": None}, sort_keys=True)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def make_inputs(
    documents: Sequence[Document], spec: DumpSpec, tokenizer: Any, vocabulary: int | None, cancelled: Callable[[], bool]
) -> Inputs:
    """Tokenise what is text, with the tokenizer's own special tokens, and cut or join it as `spec` says.

    Parameters
    ----------
    vocabulary
        Token ids are below it, where it is known.

    Raises
    ------
    InvalidInput
        There is not one token, no tokenizer for texts, a token id outside of the vocabulary, or `spec` makes no sense.
    RequestCancelled
        `cancelled` said so.
    """
    _check_form(spec)
    rows: list[Tokens] = []
    for start in range(0, len(documents), _AT_ONCE):
        if cancelled():
            raise RequestCancelled("the dump was cancelled while it was tokenised")
        rows += _tokens_of(documents[start : start + _AT_ONCE], spec, tokenizer)
    offset = _ends(len(row) for row in rows)
    if not offset[-1]:
        raise InvalidInput("the corpus has no tokens", why=f"all its {len(documents)} documents are empty")
    tokens = TokenTable(np.concatenate(rows), offset, [document.id for document in documents])
    _check_vocabulary(rows, tokens, vocabulary)
    return _cut(tokens, spec)


def _check_form(spec: DumpSpec) -> None:
    if spec.context < 1:
        raise InvalidInput(f"context is {spec.context}, and must be at least 1")
    if not 0 <= spec.stride <= spec.context:
        raise InvalidInput(f"stride is {spec.stride}, and must be from 1 to the context ({spec.context})")
    if spec.stride and spec.packed:
        raise InvalidInput("packed documents are cut where the context ends", next="leave stride or packed out")


def _tokens_of(documents: Sequence[Document], spec: DumpSpec, tokenizer: Any) -> Iterator[Tokens]:
    texts = [document.text for document in documents if document.text is not None]
    if texts and tokenizer is None:
        raise InvalidInput("the model has no tokenizer, and the corpus is text", next="give token ids")
    cut = {} if spec.stride or spec.packed else {"truncation": True, "max_length": spec.context}
    encoded = iter(tokenizer(texts, verbose=False, **cut)["input_ids"] if texts else ())
    end = getattr(tokenizer, "eos_token_id", None) if spec.packed else None
    for document in documents:
        if document.tokens is None:
            ids = next(encoded)
            ends = [end] if end is not None and ids and ids[-1] != end else []
            yield np.array([*ids, *ends], dtype=np.int32)
        else:
            yield np.array(document.tokens[: spec.context] if cut else document.tokens, dtype=np.int32)


def _check_vocabulary(rows: Sequence[Tokens], tokens: TokenTable, vocabulary: int | None) -> None:
    """Out of its bounds an embedding reads what is not there: on a GPU that ends the whole process."""
    if vocabulary is None or tokens.input_ids.max() < vocabulary:
        return
    number = next(index for index, row in enumerate(rows) if len(row) and row.max() >= vocabulary)
    raise InvalidInput(
        f"document {tokens.ids[number]} has the token id {rows[number].max()}",
        why=f"the model's vocabulary has {vocabulary} tokens",
        next="use ids of the model's own tokenizer",
    )


def _cut(tokens: TokenTable, spec: DumpSpec) -> Inputs:
    """What the model is given: documents as they are, or the inputs of a context's length that `spec` makes of them."""
    documents, total = tokens.offset, int(tokens.offset[-1])
    if spec.packed:
        begin = np.arange(0, total, spec.context, dtype=np.int64)
        offset = np.append(begin, total)
    elif spec.stride:
        parts = [_windows(int(a), int(b), spec) for a, b in itertools.pairwise(documents)]
        begin, ends = (np.concatenate(one) for one in zip(*parts, strict=True))
        offset = np.append(0, ends)
    else:
        return Inputs(tokens, documents[:-1], documents)
    position = np.arange(total) - np.repeat(begin, np.diff(offset))
    return Inputs(TokenTable(tokens.input_ids, documents, tokens.ids, position), begin, offset)


def _windows(start: int, stop: int, spec: DumpSpec) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Where the windows of a document begin and end; each but the first writes what those before it have not had."""
    count = 1 + max(0, -(-(stop - start - spec.context) // spec.stride))
    begin = start + spec.stride * np.arange(count, dtype=np.int64)
    return begin, np.minimum(begin + spec.context, stop)


def _ends(lengths: Iterator[int]) -> npt.NDArray[np.int64]:
    """The offsets of parts with these lengths that lie one after another: 0, and where each ends."""
    return np.concatenate([[0], np.cumsum(list(lengths), dtype=np.int64)])
