"""The rows of a dataset: which token each is, of which document, and where in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nnsight_hpc.wire.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

MAX_ID_BYTES = 1024
_INT32_MAX = np.iinfo(np.int32).max


@dataclass(frozen=True)
class TokenTable:
    """The tokenised corpus, in the order of the dataset's rows.

    Parameters
    ----------
    input_ids
        Token ids ``[tokens]``, integers below 2**31.
    offset
        ``[documents + 1]``: document `i` is rows ``offset[i]`` to ``offset[i + 1] - 1``.
    ids
        A name for each document, at most 1,024 bytes of UTF-8 without NUL.
    position
        ``[tokens]``: position of each token in the model's input; counted from the document's start when not given.
    """

    input_ids: npt.NDArray[Any]
    offset: npt.NDArray[Any]
    ids: Sequence[str]
    position: npt.NDArray[Any] | None = None

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The checked arrays by their path below the dataset's root.

        Raises
        ------
        InvalidInput
            Lengths, offsets or ids do not fit together.
        """
        self._check()
        offset = np.ascontiguousarray(self.offset, dtype=np.int64)
        document = np.repeat(np.arange(len(self.ids), dtype=np.int32), np.diff(offset))
        position = np.arange(len(self.input_ids)) - offset[document] if self.position is None else self.position
        return {
            "tokens/input_ids": np.ascontiguousarray(self.input_ids, dtype=np.int32),
            "tokens/document": document,
            "tokens/position": np.ascontiguousarray(position, dtype=np.int32),
            "documents/offset": offset,
            "documents/id": _encode_ids(self.ids),
        }

    def _check(self) -> None:
        tokens, offset = len(self.input_ids), np.asarray(self.offset)
        problems = []
        if not _is_offset(offset, len(self.ids), tokens):
            problems.append(f"offset must be {len(self.ids) + 1} integers that rise from 0 to the {tokens} tokens")
        for name in ("input_ids", "position"):
            values = getattr(self, name)
            if values is not None and not _is_index(np.asarray(values), tokens):
                problems.append(f"{name} must be {tokens} integers from 0 to 2**31 - 1")
        if len(self.ids) > _INT32_MAX:
            problems.append("there are more than 2**31 - 1 documents")
        if problems:
            raise InvalidInput("the tokens and documents do not fit together", why="\n".join(problems))


def _is_offset(values: npt.NDArray[Any], documents: int, tokens: int) -> bool:
    if values.shape != (documents + 1,) or not np.issubdtype(values.dtype, np.integer):
        return False
    return bool(values[0] == 0 and values[-1] == tokens and np.all(values[:-1] <= values[1:]))


def _is_index(values: npt.NDArray[Any], length: int) -> bool:
    if values.shape != (length,) or not np.issubdtype(values.dtype, np.integer):
        return False
    return not length or bool(values.min() >= 0 and values.max() <= _INT32_MAX)


def _encode_ids(ids: Sequence[str]) -> npt.NDArray[np.uint8]:
    """``[documents, longest]``: UTF-8, padded with NUL. (No fixed Zarr v3 string dtype is read by tensorstore too.)"""
    encoded = [text.encode() for text in ids]
    bad = [text for text, data in zip(ids, encoded, strict=True) if len(data) > MAX_ID_BYTES or b"\0" in data]
    if bad:
        raise InvalidInput(f"document ids must have at most {MAX_ID_BYTES} bytes and no NUL", where=repr(bad[0][:80]))
    width = max((len(data) for data in encoded), default=0) or 1
    return np.array(encoded, dtype=f"S{width}").view(np.uint8).reshape(len(encoded), width)


def decode_id(row: npt.NDArray[np.uint8]) -> str:
    """The document id that a row of ``documents/id`` holds."""
    return row.tobytes().rstrip(b"\0").decode()
