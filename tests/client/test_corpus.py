"""Reading corpora, good and bad."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnsight_hpc.client.corpus import Document, pack_corpus, read_corpus
from nnsight_hpc.wire.errors import InvalidInput, NotFound


def test_each_line_of_a_text_file_is_a_document(tmp_path):
    """Its id is its line's number; empty lines are none."""
    (tmp_path / "c.txt").write_text("one\n\n  two ü\n")
    corpus = read_corpus(tmp_path / "c.txt")
    assert corpus.documents == 2
    assert [json.loads(line) for line in corpus.lines.splitlines()] == [
        {"id": "1", "text": "one"},
        {"id": "3", "text": "two ü"},
    ]


def test_json_lines_have_ids_and_a_field_of_ones_own(tmp_path):
    """Ids are taken over as strings, and the text from the field that was named."""
    (tmp_path / "c.jsonl").write_text('{"id": 7, "body": "x\\ny"}\n{"body": "z"}\n')
    corpus = read_corpus(tmp_path / "c.jsonl", text_field="body")
    assert [json.loads(line) for line in corpus.lines.splitlines()] == [
        {"id": "7", "text": "x\ny"},
        {"id": "2", "text": "z"},
    ]


def test_bad_lines_are_named_all_at_once(tmp_path):
    """One run shows everything that has to be put right."""
    lines = [
        b'{"text": "good"}',
        b"{nonsense",
        b"[1]",
        b'{"txt": "x"}',
        b'{"text": "\xff"}',
        b'{"id": 1, "text": "again"}',
    ]
    (tmp_path / "c.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(InvalidInput) as caught:
        read_corpus(tmp_path / "c.jsonl")
    assert caught.value.what == "5 bad lines in the corpus"
    assert [line.split(":")[0] for line in caught.value.why.splitlines()] == [f"line {n}" for n in (2, 3, 4, 5, 6)]
    assert "it has 'txt'" in caught.value.why
    assert "the id '1' is that of line 1" in caught.value.why


def test_an_absent_file_a_wrong_suffix_and_an_empty_file_are_refused(tmp_path):
    """Each says so."""
    with pytest.raises(NotFound):
        read_corpus(tmp_path / "absent.txt")
    (tmp_path / "c.csv").touch()
    with pytest.raises(InvalidInput, match=r"\.csv"):
        read_corpus(tmp_path / "c.csv")
    (tmp_path / "c.txt").touch()
    with pytest.raises(InvalidInput, match="no documents"):
        read_corpus(tmp_path / "c.txt")


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=5))
def test_the_fingerprint_is_that_of_the_content(texts):
    """The same documents have the same fingerprint, and others another; every document is one line."""
    documents = [Document(str(number), text) for number, text in enumerate(texts)]
    corpus = pack_corpus(documents)
    assert corpus.fingerprint == pack_corpus(documents).fingerprint
    assert corpus.fingerprint != pack_corpus([*documents, Document("x", "y")]).fingerprint
    assert [json.loads(line)["text"] for line in corpus.lines.split(b"\n")[:-1]] == texts
