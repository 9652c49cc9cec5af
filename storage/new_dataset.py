"""What is known of a dataset before its dump is sent; tracing finds it by its entry point, and imports no storage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nnsight_hpc.storage.corpus import corpus_of, read_corpus
from nnsight_hpc.storage.schema import CaptureSpec, check_captures, dataset_folder


class NewDataset:
    """A dataset that is to be written.

    Parameters
    ----------
    name
        The dataset's.
    corpus
        A path, or documents in memory; see `read_corpus` and `corpus_of`.
    text_field
        Where a row of the corpus has its text.

    Attributes
    ----------
    lines
        The corpus as it is sent.
    fingerprint
        A hash of them.

    Raises
    ------
    InvalidInput
        The name is none, or the corpus.
    NotFound
        There is no such corpus.
    """

    def __init__(self, name: str, corpus: Any, *, text_field: str) -> None:
        self.name = dataset_folder(Path(), name).stem
        if isinstance(corpus, str | Path):
            read = read_corpus(Path(corpus), text_field=text_field)
        else:
            read = corpus_of(corpus, text_field=text_field)
        self.lines, self.fingerprint = read.lines, read.fingerprint

    def check_capture(self, name: str) -> None:
        """Raise `InvalidInput` for what cannot be the name of a capture."""
        check_captures([CaptureSpec(name, (), "float32")])
