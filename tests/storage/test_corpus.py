"""Reading corpora of all forms, good and bad."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnsight_hpc.storage.corpus import Document, corpus_of, pack_corpus, read_corpus
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


def rows(corpus) -> list[dict]:
    """What is sent of a corpus."""
    found = [json.loads(line) for line in corpus.lines.splitlines()]
    assert len(found) == corpus.documents
    return found


def test_more_bad_lines_than_fit_are_named_too(tmp_path):
    """The first ten with their reasons, the others by their numbers."""
    (tmp_path / "c.jsonl").write_text("[]\n" * 13)
    with pytest.raises(InvalidInput) as caught:
        read_corpus(tmp_path / "c.jsonl")
    assert caught.value.why.endswith("line 10: not a JSON object\nand line 11, line 12, line 13")


def test_tables_are_read_by_their_columns(tmp_path):
    """Parquet and the folder or file of a Hugging Face dataset, with texts or token ids; null is no text."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pa.table({"id": ["a", "b", "c"], "body": ["one", "two", "three"], "ids": [[1, 2], [3], []], "n": [1, 2, 3]})
    parquet.write_table(table, tmp_path / "c.parquet")
    saved = tmp_path / "saved"
    saved.mkdir()
    for number, part in enumerate((table.slice(0, 2), table.slice(2))):
        with pa.OSFile(str(saved / f"data-{number}.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
            out.write_table(part)
    files = [{"filename": f"data-{number}.arrow"} for number in range(2)]
    (saved / "state.json").write_text(json.dumps({"_data_files": files, "_fingerprint": "f"}))
    texts = [{"id": "a", "text": "one"}, {"id": "b", "text": "two"}, {"id": "c", "text": "three"}]
    for path in ("c.parquet", "saved"):
        assert rows(read_corpus(tmp_path / path, text_field="body")) == texts
        tokens = rows(read_corpus(tmp_path / path, text_field="ids"))
        assert [one["tokens"] for one in tokens] == [[1, 2], [3], []]
    assert rows(read_corpus(saved / "data-0.arrow", text_field="body")) == texts[:2]
    with pytest.raises(InvalidInput, match="no column 'text'") as caught:
        read_corpus(tmp_path / "c.parquet")
    assert caught.value.next == "it has id, body, ids, n"
    parquet.write_table(pa.table({"text": ["one", None, "three", ""]}), tmp_path / "null.parquet")
    with pytest.raises(InvalidInput, match="2 bad lines") as caught:
        read_corpus(tmp_path / "null.parquet")
    assert [line.partition(":")[0] for line in caught.value.why.splitlines()] == ["row 2", "row 4"]


def test_folders_that_are_no_corpus_are_refused(tmp_path):
    """One without the state of a dataset, and one of several splits, which are named."""
    with pytest.raises(InvalidInput, match="no dataset of Hugging Face"):
        read_corpus(tmp_path)
    (tmp_path / "dataset_dict.json").touch()
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "state.json").touch()
    with pytest.raises(InvalidInput, match="several splits") as caught:
        read_corpus(tmp_path)
    assert caught.value.next == f"name one: {tmp_path / 'train'}"


def test_without_pyarrow_the_package_is_named(tmp_path, monkeypatch):
    """The error says what to install."""
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "c.parquet").touch()
    with pytest.raises(NotFound, match=r"pyarrow, which reads \.parquet files, is not installed") as caught:
        read_corpus(tmp_path / "c.parquet")
    assert caught.value.next == "pip install pyarrow"


def test_token_ids_come_as_arrays(tmp_path):
    """One document, or one a row; what holds no integers is refused."""
    np.save(tmp_path / "one.npy", np.array([3, 1, 2], dtype=np.uint16))
    np.save(tmp_path / "two.npy", np.array([[3, 1], [2, 5]]))
    np.save(tmp_path / "bad.npy", np.zeros(3))
    assert rows(read_corpus(tmp_path / "one.npy")) == [{"id": "1", "tokens": [3, 1, 2]}]
    assert [one["tokens"] for one in rows(read_corpus(tmp_path / "two.npy"))] == [[3, 1], [2, 5]]
    for content in (None, b"nonsense"):
        if content:
            (tmp_path / "bad.npy").write_bytes(content)
        with pytest.raises(InvalidInput, match="no array of token ids"):
            read_corpus(tmp_path / "bad.npy")


def test_a_corpus_may_be_in_memory():
    """Texts, token ids in any form, and rows of a dataset; what is none of these is named by its number."""
    assert rows(corpus_of(["one", ""])) == [{"id": "1", "text": "one"}, {"id": "2", "text": ""}]
    for given_ids in ([[1, 2], [3, 4]], np.array([[1, 2], [3, 4]]), [np.array([1, 2]), (3, 4)]):
        assert [one["tokens"] for one in rows(corpus_of(given_ids))] == [[1, 2], [3, 4]]
    assert rows(corpus_of(np.array([7, 8]))) == [{"id": "1", "tokens": [7, 8]}]
    assert rows(corpus_of([{"id": 4, "text": "x"}])) == [{"id": "4", "text": "x"}]
    with pytest.raises(InvalidInput) as caught:
        corpus_of(["good", 3.5, [[1]], [-1], [2**31]])
    assert [line.partition(":")[0] for line in caught.value.why.splitlines()] == [f"document {n}" for n in (2, 3, 4, 5)]
    for other in ("one text", 3):
        with pytest.raises(InvalidInput, match="is no corpus"):
            corpus_of(other)


def test_what_is_too_long_for_a_line_is_refused(monkeypatch):
    """The daemon reads a corpus line by line, and holds one of bounded length."""
    monkeypatch.setattr("nnsight_hpc.storage.corpus.LONGEST_LINE", 100)
    with pytest.raises(InvalidInput, match="document 2 has") as caught:
        corpus_of(["short", "long" * 100])
    assert "divide it" in caught.value.next


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=5))
def test_the_fingerprint_is_that_of_the_content(texts):
    """The same documents have the same fingerprint, and others another; every document is one line."""
    documents = [Document(str(number), text) for number, text in enumerate(texts)]
    corpus = pack_corpus(documents)
    assert corpus.fingerprint == pack_corpus(documents).fingerprint
    assert corpus.fingerprint != pack_corpus([*documents, Document("x", "y")]).fingerprint
    assert [json.loads(line)["text"] for line in corpus.lines.split(b"\n")[:-1]] == texts
