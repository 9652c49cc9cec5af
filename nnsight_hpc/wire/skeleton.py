"""The small files of a model that are not weights: with them a laptop builds its module tree and its tokenizer.

Only files of these names are ever handed out; none of them holds code or weights.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from nnsight_hpc.wire.errors import InvalidInput
from nnsight_hpc.wire.messages import ModelFile

if TYPE_CHECKING:
    from pathlib import Path

CONFIG = "config.json"
NAMES = frozenset(
    {
        CONFIG,
        "generation_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "spiece.model",
        "sentencepiece.bpe.model",
        "chat_template.jinja",
        "chat_template.json",
    }
)
MOST = 64 << 20
"""Bytes of one file at most (the largest vocabularies take about 35 MB)."""


def skeleton_files(folder: Path) -> list[Path]:
    """The files of a model's folder that may be handed out, by name; empty where there is no ``config.json``.

    Raises `InvalidInput` for one that is larger than `MOST`.
    """
    if not (folder / CONFIG).is_file():
        return []
    files = [folder / name for name in sorted(NAMES) if (folder / name).is_file()]
    for file in files:
        if (size := file.stat().st_size) > MOST:
            raise InvalidInput(
                f"{file.name} is too large to be handed out", where=str(file), why=f"{size} bytes, at most {MOST}"
            )
    return files


def describe(folder: Path) -> tuple[ModelFile, ...]:
    """Name, size and checksum of each of `skeleton_files`."""
    contents = {file.name: file.read_bytes() for file in skeleton_files(folder)}
    return tuple(
        ModelFile(name=name, size=len(data), sha256=hashlib.sha256(data).hexdigest()) for name, data in contents.items()
    )
